"""Several processes (gloo): rows survive, the discriminator stays one, and all is as in one process on the global batches."""

from __future__ import annotations

import copy
import gc
import itertools
import multiprocessing
import pickle
import time
import traceback
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DistributedSampler

from aikd_losses import (
    AdversarialDistributionLoss,
    AIKDLoss,
    CachedTargets,
    EMATargets,
    FrozenTeacher,
    MLPDiscriminator,
    ProgressiveKD,
    ZeroCenteredPenalty,
)

N, C, WORLD = 16, 3, 2
X = torch.randn(N, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.arange(N) % C


class Learner(nn.Module):
    """What a framework wraps: the network, the frozen teacher and the criterion in one module, in float64."""

    def __init__(self, path=None, process_group=None):
        super().__init__()
        torch.manual_seed(0)
        self.teacher = FrozenTeacher(nn.Linear(4, C))
        self.network = nn.Linear(4, C)
        targets = CachedTargets(N, C, dtype=torch.float64, path=path, process_group=process_group)
        discriminator = MLPDiscriminator(C, hidden=(8,))
        self.criterion = AIKDLoss(
            N, C, 4, targets=targets, discriminator=discriminator, penalty=ZeroCenteredPenalty(0.1),
            process_group=process_group,
        )  # fmt: skip
        self.double()

    def forward(self, index):
        s, t = self.network(X[index]), self.teacher(X[index])
        loss, _ = self.criterion(student_logits=s, teacher_logits=t, target=Y[index], index=index)
        self.criterion.update(student_logits=s, teacher_logits=t, index=index)  # before backward, as frameworks must
        return loss


class Averaged(nn.Module):
    """Data parallelism by hand, over a process group."""

    def __init__(self, learner, group=None):
        super().__init__()
        self.learner = learner
        for parameter in learner.parameters():
            parameter.register_hook(lambda grad: self.mean(grad, group))

    @staticmethod
    def mean(grad, group):
        total = grad.clone()
        dist.all_reduce(total, group=group)
        return total / dist.get_world_size(group)

    def forward(self, index):
        return self.learner(index)


def batches(epoch):
    """The global batches of an epoch: samples move between ranks from epoch to epoch."""
    return torch.randperm(N, generator=torch.Generator().manual_seed(epoch)).split(8)


def train(model, learner, part, epochs=range(3)):
    """The losses of all steps; each the mean over the ranks."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for epoch in epochs:
        for batch in batches(epoch):
            loss = model(part(batch))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        learner.criterion.advance_epoch()
    return torch.stack(losses)


def facts(learner, losses):
    """All there is to compare: losses, store, discriminator and its optimizer's moments, epochs, the network."""
    criterion = learner.criterion
    moments = criterion.terms["adversarial"].optimizer.state_dict()["state"]
    state = {k: v.clone() for k, v in criterion.state_dict().items() if "optimizer" not in k}
    state |= {f"moments.{i}.{name}": x.clone() for i, one in moments.items() for name, x in one.items()}
    weight = learner.network.weight
    weight = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
    return state | {"losses": losses, "network": weight.detach().clone()}


def alone():
    learner = Learner()
    return facts(learner, train(learner, learner, lambda batch: batch))


def assert_one_run(results, expected):
    """Every rank has what one process has; losses are the mean over the ranks."""
    losses = torch.stack([result.pop("losses") for result in results]).mean(0)
    torch.testing.assert_close(losses, expected["losses"], rtol=1e-10, atol=1e-10)
    for result in results:
        assert result.keys() == expected.keys() - {"losses"}
        for name, value in result.items():
            assert torch.equal(value, results[0][name]), name  # the same on all, bit for bit
            torch.testing.assert_close(value, expected[name], rtol=1e-10, atol=1e-10, msg=name)


def _process(rank, world, rendezvous, work, queue):
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo", init_method=rendezvous, rank=rank, world_size=world, timeout=timedelta(seconds=60)
        )
        queue.put((rank, pickle.dumps(work(rank))))  # by value: the process is about to end
        dist.barrier()
        gc.collect()  # DDP is a cycle that holds the process group
        dist.destroy_process_group()
    except BaseException:
        queue.put((rank, traceback.format_exc()))


@pytest.fixture
def on_ranks(tmp_path):
    def run(work, world=WORLD):
        context = multiprocessing.get_context("fork")
        queue = context.Queue()
        rendezvous = f"file://{tmp_path / f'rendezvous-{next(runs)}'}"
        processes = [context.Process(target=_process, args=(r, world, rendezvous, work, queue)) for r in range(world)]
        for process in processes:
            process.start()
        results = dict(queue.get(timeout=120) for _ in processes)
        for process in processes:
            process.join(60)
        for result in results.values():
            assert not isinstance(result, str), result
        return [pickle.loads(results[rank]) for rank in range(world)]

    runs = itertools.count()
    return run


def part_of(rank):
    return lambda batch: batch[rank :: dist.get_world_size()]


def under_ddp(rank):
    learner = Learner()
    return facts(learner, train(nn.parallel.DistributedDataParallel(learner), learner, part_of(rank)))


def under_fsdp(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    learner = Learner()
    fully_shard(learner, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return facts(learner, train(learner, learner, part_of(rank)))


def by_hand(rank):
    learner = Learner()
    return facts(learner, train(Averaged(learner), learner, part_of(rank)))


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("wrapped", [under_ddp, under_fsdp, by_hand])
def test_ranks_are_one_process_on_the_global_batches(wrapped, world, on_ranks):
    expected = alone()
    assert expected["terms.progressive.targets.known"].all()
    start = Learner().criterion.state_dict()
    weights = [
        name for name in start if name.endswith(("0.weight", "2.weight"))
    ]  # biases may cancel in Wasserstein's loss
    assert len(weights) == 2
    assert not any(torch.allclose(expected[name], start[name]) for name in weights)
    assert_one_run(on_ranks(wrapped, world), expected)


@pytest.mark.parametrize("machines", [1, 2])
def test_ranks_that_share_a_file_are_one_process(machines, on_ranks, tmp_path):
    """A file a machine; that of another machine is one of another name here."""

    def work(rank):
        learner = Learner(path=tmp_path / f"machine-{rank * machines // 4}")
        return facts(learner, train(nn.parallel.DistributedDataParallel(learner), learner, part_of(rank)))

    assert_one_run(on_ranks(work, 4), alone())
    assert len(list(tmp_path.glob("machine-*"))) == machines


def test_of_ranks_that_share_a_file_one_writes_it_and_none_goes_on_before(on_ranks, tmp_path):
    """The second rank of the first machine comes late to the exchange's end: it must not put an old row over a new one."""

    def work(rank):
        machine = rank // 2
        store = CachedTargets(N, C, path=tmp_path / f"machine-{machine}")
        dist.barrier()
        writes = []
        index_copy = torch.Tensor.index_copy_
        store.write(torch.tensor([rank]), torch.eye(C)[[rank % C]])
        torch.Tensor.index_copy_ = lambda x, *args: (writes.append(rank), time.sleep(0.2), index_copy(x, *args))[2]
        try:
            store.advance_epoch()
        finally:
            torch.Tensor.index_copy_ = index_copy
        return len(writes) > 0, store.read(torch.arange(4))[0].argmax(-1).tolist()

    assert on_ranks(work, 4) == [(wrote, [0, 1, 2, 0]) for wrote in (True, False, True, False)]


def test_a_sampler_that_pads_with_duplicates_leaves_the_same_rows_on_all_ranks(on_ranks):
    def work(rank):
        stores = CachedTargets(N, C), EMATargets(N, C, decay=0.5), CachedTargets(N, C, top_k=1)
        sampler = DistributedSampler(range(N - 3), dist.get_world_size(), rank, seed=1)
        assert len(sampler) * dist.get_world_size() > N - 3
        for epoch in range(2):
            sampler.set_epoch(epoch)
            index = torch.tensor(list(sampler))
            for store in stores:
                store.write(index, torch.eye(C)[(index + epoch) % C])
                store.advance_epoch()
        return [store.read(torch.arange(N)) for store in stores]

    i = torch.arange(N)
    first, second = torch.eye(C)[i % C], torch.eye(C)[(i + 1) % C]
    for results in on_ranks(work, 4):
        for (probs, known), expected in zip(results, (second, 0.5 * first + 0.5 * second, second), strict=True):
            assert known.tolist() == [True] * (N - 3) + [False] * 3
            assert torch.equal(probs[known], expected[known])


def test_groups_of_ranks_train_apart(on_ranks):
    """Four ranks as two replicas of two, as on a mesh whose other axis is tensor parallelism."""

    def work(rank):
        groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        group = groups[rank // 2]
        torch.manual_seed(rank)  # each rank has a discriminator of its own before the first update
        learner = Learner(process_group=group)
        if rank // 2:
            learner.network.weight.data.neg_()  # another model altogether
        return facts(learner, train(Averaged(learner, group), learner, lambda batch: batch[dist.get_rank(group) :: 2]))

    results = on_ranks(work, 4)
    assert_one_run(results[:2], alone())
    assert torch.equal(results[2]["network"], results[3]["network"])
    assert not torch.allclose(results[0]["network"], results[2]["network"])


def test_a_run_goes_on_with_another_number_of_ranks(on_ranks, tmp_path):
    """Four ranks, then one, then two, an epoch each."""

    def an_epoch(rank, epoch):
        several = dist.is_initialized()
        learner = Learner()
        if epoch:
            saved = torch.load(tmp_path / f"checkpoint-{epoch}", weights_only=True)
            learner.network.load_state_dict(saved["network"])
            learner.criterion.load_state_dict(saved["criterion"])
        model = nn.parallel.DistributedDataParallel(learner) if several else learner
        losses = train(model, learner, part_of(rank) if several else lambda batch: batch, [epoch])
        if rank == 0:
            states = {"network": learner.network.state_dict(), "criterion": learner.criterion.state_dict()}
            torch.save(states, tmp_path / f"checkpoint-{epoch + 1}")
        return facts(learner, losses)

    expected = alone()
    on_ranks(lambda rank: an_epoch(rank, 0), 4)
    an_epoch(0, 1)
    results = on_ranks(lambda rank: an_epoch(rank, 2), 2)
    expected["losses"] = expected["losses"][-2:]
    assert_one_run(results, expected)


def test_a_process_group_is_one_that_this_process_belongs_to(on_ranks):
    def work(rank):
        others = [dist.new_group([r]) for r in range(2)][1 - rank]
        with pytest.raises(TypeError, match=r"`process_group` must be None or a torch.distributed.ProcessGroup"):
            CachedTargets(N, C, process_group=others)
        own = ProgressiveKD(CachedTargets(N, C, process_group=dist.group.WORLD))
        with pytest.raises(TypeError, match=r"A loss with a `process_group` cannot be pickled: save its `state_dict"):
            pickle.dumps(own)
        copied = copy.deepcopy(own)
        copied.targets.write(torch.tensor([rank]), torch.eye(C)[[rank]])
        copied.targets.advance_epoch()
        return copied.targets.known.sum().item(), own.targets.known.sum().item()

    assert on_ranks(work) == [(2, 0), (2, 0)]


def uneven(chunk_bytes):
    """Rank 0 writes three rows, rank 1 five, one of which rank 0 has written too; in epoch 2 rank 1 writes nothing."""

    def work(rank):
        from aikd_losses import _ranks

        _ranks.CHUNK_BYTES = chunk_bytes
        received, all_gather = [], dist.all_gather

        def counting(tensors, *args, **kwargs):
            received.append(tensors[0].numel() * tensors[0].element_size())
            all_gather(tensors, *args, **kwargs)

        dist.all_gather = counting
        results = []
        for store in (CachedTargets(N, C), EMATargets(N, C, decay=0.5), CachedTargets(N, C, top_k=2)):
            written = {0: [0, 1, 2], 1: [2, 9, 11, 13, 15]}[rank]
            store.write(torch.tensor(written), torch.eye(C)[[rank] * len(written)])
            store.advance_epoch()
            if not results:
                dist.all_gather = all_gather
            if rank == 0:
                store.write(torch.tensor([15]), torch.eye(C)[[2]])
            store.advance_epoch()
            results.append(store.read(torch.arange(N)))
        return results, received

    return work


@pytest.mark.parametrize(
    ("chunk_bytes", "lengths"), [(1, [1, 1, 1, 1, 1]), (60, [2, 2, 1]), (149, [4, 1]), (150, [5]), (2**26, [5])]
)
def test_uneven_ranks_and_one_that_wrote_nothing_exchange_their_rows_in_chunks(chunk_bytes, lengths, on_ranks):
    (first, received), (second, other_received) = on_ranks(uneven(chunk_bytes))
    for (probs, known), (other_probs, other_known), ema in zip(first, second, (False, True, False), strict=True):
        assert torch.equal(probs, other_probs)
        assert torch.equal(known, other_known)
        assert known.nonzero().flatten().tolist() == [0, 1, 2, 9, 11, 13, 15]
        assert probs[[0, 1]].argmax(-1).tolist() == [0, 0]
        assert probs[[2, 9, 11, 13]].argmax(-1).tolist() == [1, 1, 1, 1]  # of two ranks the higher one wins
        assert probs[15].tolist() == ([0, 0.5, 0.5] if ema else [0, 0, 1])
    # First which file and how many rows. A row: the id (8 bytes), three classes in float16 (6) and whether it is known (1).
    assert received == other_received == [8, 8] + [length * size for length in lengths for size in (8, 6, 1)]


@pytest.mark.parametrize(
    ("backend", "device", "sent"),
    [
        ("nccl", "cpu", True),
        ("nccl", "cuda", False),
        ("gloo", "cpu", False),
        ("cpu:gloo,cuda:nccl", "cpu", False),
        ("mpi", "cpu", False),
    ],
)
def test_what_is_on_the_cpu_goes_through_the_gpu_where_the_backend_knows_no_other_way(
    backend, device, sent, monkeypatch
):
    """With a stand-in for the tensor, as there is no GPU here."""
    from aikd_losses._ranks import Ranks

    class Stored:
        def __init__(self, device):
            self.device, self.to = torch.device(device), Stored

    group = object()
    ranks = Ranks(None)
    ranks.group = group
    monkeypatch.setattr(dist, "get_backend", {group: backend}.__getitem__)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    x = Stored(device)
    assert ranks._reachable(x).device == torch.device("cuda:3" if sent else device)
    assert (ranks._reachable(x) is x) != sent


def of_unequal_size(rank):
    torch.manual_seed(rank)
    discriminator = MLPDiscriminator(C, hidden=(4,))
    sgd = torch.optim.SGD(discriminator.parameters(), lr=0.1)
    loss = AdversarialDistributionLoss(discriminator, optimizer=sgd)
    s, t = torch.randn(2, 7, C, generator=torch.Generator().manual_seed(5))
    part = slice(0, 2) if rank == 0 else slice(2, 7)
    value = loss.update(s[part], t[part])
    return value, {k: v.clone() for k, v in discriminator.state_dict().items()}


def test_ranks_with_unequal_batches_take_the_step_of_the_joint_one(on_ranks):
    (value, first), (other_value, second) = on_ranks(of_unequal_size)
    torch.manual_seed(0)  # rank 0's discriminator
    discriminator = MLPDiscriminator(C, hidden=(4,))
    loss = AdversarialDistributionLoss(discriminator, optimizer=torch.optim.SGD(discriminator.parameters(), lr=0.1))
    s, t = torch.randn(2, 7, C, generator=torch.Generator().manual_seed(5))
    expected = loss.update(s, t)
    torch.testing.assert_close(value, expected)
    assert torch.equal(value, other_value)
    for name, weight in discriminator.state_dict().items():
        torch.testing.assert_close(first[name], weight)
        assert torch.equal(first[name], second[name])


@pytest.mark.parametrize("where", ["one", "each", "some"])
def test_ranks_that_share_a_file_or_have_one_each_or_none_all_hold_what_both_wrote(where, on_ranks, tmp_path):
    """Each rank writes rows of its own, and one that both write."""

    def work(rank):
        path = {"one": tmp_path / "rows", "each": tmp_path / f"rows {rank}", "some": [None, tmp_path / "rows"][rank]}[
            where
        ]
        store = CachedTargets(N, C, path=path)
        seen = []
        for epoch in range(3):
            store.write(torch.tensor([epoch, 8 + rank]), torch.eye(C)[[(rank + epoch) % C] * 2])
            store.advance_epoch()
            dist.barrier()
            seen.append(tuple(x.clone() for x in store.read(torch.arange(N))))
            assert path is None or path.read_bytes()[4080:4096] == bytes(16)  # nobody is writing
            dist.barrier()
        return seen

    first, second = on_ranks(work)
    for epoch, reads in enumerate(zip(first, second, strict=True)):
        assert torch.equal(reads[0][0], reads[1][0])
        for probs, known in reads:
            assert known.nonzero().flatten().tolist() == [*range(epoch + 1), 8, 9]
            assert probs[[8, 9]].argmax(-1).tolist() == [epoch % C, (1 + epoch) % C]
    for path in tmp_path.glob("rows*"):
        assert CachedTargets(N, C, path=path).read(torch.arange(3))[1].all()


def in_a_group_of_two(path):
    """Of three ranks the last two train together."""

    def work(rank):
        group = dist.new_group([1, 2])
        if rank == 0:
            return None
        torch.manual_seed(rank)
        discriminator = MLPDiscriminator(C, hidden=(4,))
        sgd = torch.optim.SGD(discriminator.parameters(), lr=0.1)
        loss = AdversarialDistributionLoss(discriminator, optimizer=sgd, process_group=group)
        stores = CachedTargets(N, C, process_group=group), CachedTargets(N, C, path=path, process_group=group)
        s, t = torch.randn(2, 7, C, generator=torch.Generator().manual_seed(5))
        part = slice(0, 2) if rank == 1 else slice(2, 7)
        value = loss.update(s[part], t[part])
        reads = []
        for store in stores:
            store.write(torch.arange(N)[part], s[part].softmax(-1))
            copy.deepcopy(store).advance_epoch()  # which the same two ranks do
            store.advance_epoch()
            reads.append(store.read(torch.arange(N)))
        with pytest.raises(TypeError) as error:
            pickle.dumps(stores[0])
        return value, {k: v.clone() for k, v in discriminator.state_dict().items()}, reads, str(error.value)

    return work


def test_a_group_of_ranks_trains_as_if_there_were_no_others(on_ranks, tmp_path):
    nothing, *both = on_ranks(in_a_group_of_two(tmp_path / "rows"), world=3)
    assert nothing is None
    torch.manual_seed(1)  # the discriminator of the group's first rank
    discriminator = MLPDiscriminator(C, hidden=(4,))
    loss = AdversarialDistributionLoss(discriminator, optimizer=torch.optim.SGD(discriminator.parameters(), lr=0.1))
    s, t = torch.randn(2, 7, C, generator=torch.Generator().manual_seed(5))
    expected = loss.update(s, t)
    for value, state, reads, error in both:
        torch.testing.assert_close(value, expected)
        for name, weight in discriminator.state_dict().items():
            torch.testing.assert_close(state[name], weight)
        for probs, known in reads:
            assert known.nonzero().flatten().tolist() == list(range(7))
            torch.testing.assert_close(probs[:7], s.softmax(-1), rtol=1e-3, atol=1e-4)
        assert error == "A loss with a `process_group` cannot be pickled: save its `state_dict()`."
