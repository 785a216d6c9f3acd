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
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.testing import assert_close
from torch.utils.data import DistributedSampler

from aikd_losses import (
    AdversarialDistributionLoss,
    AIKDLoss,
    CachedTargets,
    EMATargets,
    FrozenTeacher,
    GradientPenalty,
    MLPDiscriminator,
    ProgressiveKD,
    ZeroCenteredPenalty,
    _ranks,
)

N, C = 16, 3
X = torch.randn(N, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.arange(N) % C
DDP = nn.parallel.DistributedDataParallel


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


def averaged(learner, group=None):
    """Data parallelism by hand, over a process group."""

    def mean(grad):
        total = grad.clone()
        dist.all_reduce(total, group=group)
        return total / dist.get_world_size(group)

    for parameter in learner.parameters():
        parameter.register_hook(mean)
    return learner


SHARDS = pytest.mark.skipif(
    torch.__version__ < (2, 7),
    reason="torch has fully_shard from 2.6 on, which there asks a CPU for Stream.record_event",
)


def sharded(learner):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    return fully_shard(learner, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))


def batches(epoch):
    """The global batches of an epoch: samples move between ranks from epoch to epoch."""
    return torch.randperm(N, generator=torch.Generator().manual_seed(epoch)).split(8)


def trained(learner, model, part, epochs=range(3)):
    """All there is to compare: losses, store, discriminator and its optimizer's moments, epochs, the network."""
    optimizer, criterion, losses = torch.optim.SGD(model.parameters(), lr=0.1), learner.criterion, []
    for epoch in epochs:
        for batch in batches(epoch):
            loss = model(part(batch))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        criterion.advance_epoch()
    moments = criterion.terms["adversarial"].optimizer.state_dict()["state"]
    state = {k: v.clone() for k, v in criterion.state_dict().items() if "optimizer" not in k}
    state |= {f"moments.{i}.{name}": x.clone() for i, one in moments.items() for name, x in one.items()}
    weight = learner.network.weight
    weight = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
    return state | {"losses": torch.stack(losses), "network": weight.detach().clone()}


def alone():
    learner = Learner()
    return trained(learner, learner, lambda batch: batch)


def part_of(rank):
    return lambda batch: batch[rank :: dist.get_world_size()]


def assert_one_run(results, expected):
    """Every rank has what one process has; losses are the mean over the ranks."""
    losses = torch.stack([result.pop("losses") for result in results]).mean(0)
    assert_close(losses, expected["losses"], rtol=1e-10, atol=1e-10)
    for result in results:
        assert result.keys() == expected.keys() - {"losses"}
        for name, value in result.items():
            assert torch.equal(value, results[0][name]), name  # the same on all, bit for bit
            assert_close(value, expected[name], rtol=1e-10, atol=1e-10, msg=name)


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
    def run(work, world=2):
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


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("wrap", [DDP, pytest.param(sharded, marks=SHARDS), averaged])
def test_ranks_are_one_process_on_the_global_batches(wrap, world, on_ranks):
    def work(rank):
        learner = Learner()
        return trained(learner, wrap(learner), part_of(rank))

    expected, start = alone(), Learner().criterion.state_dict()
    assert expected["terms.progressive.targets.known"].all()
    weights = [name for name in start if name.endswith(("0.weight", "2.weight"))]  # biases may cancel in the loss
    assert [torch.allclose(expected[name], start[name]) for name in weights] == [False, False]
    assert_one_run(on_ranks(work, world), expected)


FILES = {  # which of them a rank maps; that of another machine is one of another name here
    "one": lambda rank: "rows",
    "a machine": lambda rank: f"rows {rank // 2}",
    "each": lambda rank: f"rows {rank}",
    "some": lambda rank: "rows" if rank == 1 else None,
}


@pytest.mark.parametrize("file", FILES.values(), ids=FILES)
def test_ranks_that_share_a_file_or_have_one_each_or_none_are_one_process(file, on_ranks, tmp_path):
    def work(rank):
        name = file(rank)
        learner = Learner(path=name and tmp_path / name)
        return trained(learner, DDP(learner), part_of(rank))

    expected = alone()
    assert_one_run(on_ranks(work, 4), expected)
    for name in {*map(file, range(4))} - {None}:  # each of them whole
        rows = CachedTargets(N, C, dtype=torch.float64, path=tmp_path / name).state_dict()["rows"]
        assert_close(rows, expected["terms.progressive.targets.rows"], rtol=1e-10, atol=1e-10)


def test_of_ranks_that_share_a_file_one_writes_it_and_none_goes_on_before(on_ranks, tmp_path, monkeypatch):
    """The second rank of the first machine comes late to the exchange's end: it must not put an old row over a new one."""

    def work(rank):
        store = CachedTargets(N, C, path=tmp_path / f"machine-{rank // 2}")
        dist.barrier()
        store.write(torch.tensor([rank]), torch.eye(C)[[rank % C]])
        writes.clear()
        store.advance_epoch()
        return len(writes) > 0, store.read(torch.arange(4))[0].argmax(-1).tolist()

    writes, index_copy = [], torch.Tensor.index_copy_
    slow = lambda x, *args: (writes.append(x), time.sleep(0.2), index_copy(x, *args))[2]  # noqa: E731
    monkeypatch.setattr(torch.Tensor, "index_copy_", slow)
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
        group = [dist.new_group([0, 1]), dist.new_group([2, 3])][rank // 2]
        torch.manual_seed(rank)  # each rank has a discriminator of its own before the first update
        learner = Learner(process_group=group)
        if rank // 2:
            learner.network.weight.data.neg_()  # another model altogether
        return trained(learner, averaged(learner, group), lambda batch: batch[dist.get_rank(group) :: 2])

    results = on_ranks(work, 4)
    assert_one_run(results[:2], alone())
    assert torch.equal(results[2]["network"], results[3]["network"])
    assert not torch.allclose(results[0]["network"], results[2]["network"])


def by_torch(both, path, rank, load):
    if load:
        both.load_state_dict(torch.load(path, weights_only=True))
    elif rank == 0:
        torch.save(both.state_dict(), path)


def by_dcp(both, path, rank, load):
    """As runs with FSDP2 do it."""
    state = get_model_state_dict(both)
    if load:
        dcp.load(state, checkpoint_id=path)
        set_model_state_dict(both, state)
    else:
        dcp.save(state, checkpoint_id=path)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # in one process
@pytest.mark.parametrize("checkpoint", [by_torch, by_dcp])
def test_a_run_goes_on_with_another_number_of_ranks(checkpoint, on_ranks, tmp_path):
    """Four ranks, then one, then two, an epoch each."""

    def an_epoch(rank, epoch):
        learner, several = Learner(), dist.is_initialized()
        both = nn.ModuleDict({"network": learner.network, "criterion": learner.criterion})
        if epoch:
            checkpoint(both, tmp_path / f"checkpoint-{epoch}", rank, load=True)
        model = DDP(learner) if several else learner
        found = trained(learner, model, part_of(rank) if several else lambda batch: batch, [epoch])
        checkpoint(both, tmp_path / f"checkpoint-{epoch + 1}", rank, load=False)
        return found

    expected = alone()
    on_ranks(lambda rank: an_epoch(rank, 0), 4)
    an_epoch(0, 1)
    results = on_ranks(lambda rank: an_epoch(rank, 2), 2)
    assert_one_run(results, expected | {"losses": expected["losses"][-2:]})


def test_a_process_group_is_one_that_this_process_belongs_to_and_is_not_pickled(on_ranks):
    def work(rank):
        others = [dist.new_group([r]) for r in range(2)][1 - rank]
        with pytest.raises(TypeError, match=r"`process_group` must be None or a torch.distributed.ProcessGroup"):
            CachedTargets(N, C, process_group=others)
        with pytest.raises(TypeError) as error:
            pickle.dumps(ProgressiveKD(CachedTargets(N, C, process_group=dist.group.WORLD)))
        return str(error.value)

    assert on_ranks(work) == ["cannot pickle 'torch._C._distributed_c10d.ProcessGroup' object"] * 2


@pytest.mark.parametrize("others", [0, 1])
def test_ranks_with_unequal_batches_take_the_joint_step_as_if_there_were_no_others(others, on_ranks, tmp_path):
    """Two ranks, also as the last two of three."""
    s, t = torch.randn(2, 7, C)

    def build(seed, group=None):
        torch.manual_seed(seed)
        discriminator = MLPDiscriminator(C, hidden=(4,))
        sgd = torch.optim.SGD(discriminator.parameters(), lr=0.1)
        return AdversarialDistributionLoss(discriminator, optimizer=sgd, process_group=group)

    def work(rank):
        group = dist.new_group([1, 2]) if others else None
        if rank < others:
            return None
        loss, part, reads = build(rank, group), slice(0, 2) if rank == others else slice(2, 7), []
        value = loss.update(s[part], t[part])
        for path in (None, tmp_path / "rows"):
            store = CachedTargets(N, C, path=path, process_group=group)
            store.write(torch.arange(N)[part], s[part].softmax(-1))
            for each in (copy.deepcopy(store), store):  # the same two ranks have copies of it
                each.advance_epoch()
                reads.append(each.read(torch.arange(N)))
        return value, {k: v.clone() for k, v in loss.discriminator.state_dict().items()}, reads

    *nothing, first, second = on_ranks(work, 2 + others)
    assert nothing == [None] * others
    assert_close(first[:2], second[:2], rtol=0, atol=0)
    joint = build(others)  # the discriminator of the first of the two
    assert_close(first[0], joint.update(s, t))
    assert_close(first[1], dict(joint.discriminator.state_dict()))
    for probs, known in first[2] + second[2]:
        assert known.nonzero().flatten().tolist() == list(range(7))
        assert_close(probs[:7], s.softmax(-1), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("nothing", ["all masked", "no rows"])
@pytest.mark.parametrize("penalty", [None, GradientPenalty(10.0), ZeroCenteredPenalty(0.1)])
def test_a_rank_that_has_run_out_of_batches_takes_part_and_adds_nothing(penalty, nothing, on_ranks, monkeypatch):
    """Rank 0 has a batch less than rank 1; in its place it gives rows that do not count, or none."""
    monkeypatch.setattr(torch, "rand_like", lambda x: torch.full_like(x, 0.5))  # the penalty's draws
    s, t = torch.randn(2, 3, 4, C, dtype=torch.float64)

    def build(seed):
        torch.manual_seed(seed)
        discriminator = MLPDiscriminator(C, hidden=(4,)).double()
        adam = torch.optim.Adam(discriminator.parameters(), lr=0.1)
        return AdversarialDistributionLoss(discriminator, penalty=penalty, optimizer=adam)

    def steps(loss, batches):
        values = [loss.update(x, y, mask=mask) for x, y, mask in batches]
        norm = loss.diagnostics()["gradient_norm"]
        return values, norm, {k: v.clone() for k, v in loss.discriminator.state_dict().items()}

    def work(rank):
        batches = [(s[i], t[i], None) for i in (rank, 2)]
        if rank == 0:
            rows = slice(0) if nothing == "no rows" else slice(None)
            batches[1] = s[0, rows], t[0, rows], torch.zeros(4, dtype=torch.bool)[rows]
        return steps(build(rank), batches)

    first, second = on_ranks(work)
    assert_close(first, second, rtol=0, atol=0)
    assert_close(first, steps(build(0), [(s[:2].flatten(0, 1), t[:2].flatten(0, 1), None), (s[2], t[2], None)]))


@pytest.mark.parametrize(
    ("chunk_bytes", "lengths"), [(1, [1, 1, 1, 1, 1]), (60, [2, 2, 1]), (149, [4, 1]), (150, [5]), (2**26, [5])]
)
def test_uneven_ranks_and_one_that_wrote_nothing_exchange_their_rows_in_chunks(
    chunk_bytes, lengths, on_ranks, monkeypatch
):
    """Rank 0 writes three rows, rank 1 five, one of which rank 0 has written too; in epoch 2 rank 1 writes nothing."""

    def counting(tensors, *args, **kwargs):
        received.append(tensors[0].numel() * tensors[0].element_size())
        all_gather(tensors, *args, **kwargs)

    def work(rank):
        results, sizes = [], []
        for store in (CachedTargets(N, C), EMATargets(N, C, decay=0.5), CachedTargets(N, C, top_k=2)):
            written = [[0, 1, 2], [2, 9, 11, 13, 15]][rank]
            store.write(torch.tensor(written), torch.eye(C)[[rank] * len(written)])
            store.advance_epoch()
            sizes = sizes or list(received)
            if rank == 0:
                store.write(torch.tensor([15]), torch.eye(C)[[2]])
            store.advance_epoch()
            results.append(store.read(torch.arange(N)))
        return results, sizes

    received, all_gather = [], dist.all_gather
    monkeypatch.setattr(_ranks, "CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr(dist, "all_gather", counting)
    first, second = on_ranks(work)
    assert_close(first[0], second[0], rtol=0, atol=0)
    for (probs, known), last in zip(first[0], ([0, 0, 1], [0, 0.5, 0.5], [0, 0, 1]), strict=True):
        assert known.nonzero().flatten().tolist() == [0, 1, 2, 9, 11, 13, 15]
        assert probs[[0, 1]].argmax(-1).tolist() == [0, 0]
        assert probs[[2, 9, 11, 13]].argmax(-1).tolist() == [1, 1, 1, 1]  # of two ranks the higher one wins
        assert probs[15].tolist() == last
    # First which file and how many rows. A row: the id (8 bytes), three classes in float16 (6) and whether it is known (1).
    assert first[1] == second[1] == [8, 8] + [length * size for length in lengths for size in (8, 6, 1)]


@pytest.mark.parametrize(
    ("backend", "device", "sent"),
    [("nccl", "cpu", True), ("nccl", "cuda", False), ("gloo", "cpu", False), ("cpu:gloo,cuda:nccl", "cpu", False)],
)
def test_what_is_on_the_cpu_goes_through_the_gpu_where_the_backend_knows_no_other_way(
    backend, device, sent, monkeypatch
):
    """With stand-ins, as there is no GPU here."""

    def stored(device):
        return SimpleNamespace(device=torch.device(device), to=stored)

    monkeypatch.setattr(dist, "get_backend", lambda group: backend)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    x = stored(device)
    found = _ranks.Ranks(None)._reachable(x)
    assert found.device == torch.device("cuda:3" if sent else device)
    assert (found is x) != sent
