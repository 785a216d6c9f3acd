"""Two processes (gloo): rows survive, and the discriminator trains and stays the same on both."""

from __future__ import annotations

import copy
import gc
import multiprocessing
import pickle
import traceback
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn

from aikd_losses import (
    AdversarialDistributionLoss,
    AIKDLoss,
    CachedTargets,
    EMATargets,
    FrozenTeacher,
    MLPDiscriminator,
)

N, C, WORLD = 16, 3, 2
X = torch.randn(N, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(N) % C


class Learner(nn.Module):
    """What a framework wraps: the network, the frozen teacher and the criterion in one module."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.teacher = FrozenTeacher(nn.Linear(4, C))
        self.network = nn.Linear(4, C)
        discriminator = MLPDiscriminator(C, hidden=(8,))
        self.criterion = AIKDLoss(N, C, 4, discriminator=discriminator, penalty=None)

    def forward(self, index):
        s, t = self.network(X[index]), self.teacher(X[index])
        loss, _ = self.criterion(student_logits=s, teacher_logits=t, target=Y[index], index=index)
        self.criterion.update(student_logits=s, teacher_logits=t, index=index)  # before backward, as frameworks must
        return loss


def batches(epoch):
    """The global batches of an epoch: samples move between ranks from epoch to epoch."""
    return torch.randperm(N, generator=torch.Generator().manual_seed(epoch)).split(8)


def train(model, learner, part, epochs=2):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for epoch in range(epochs):
        for batch in batches(epoch):
            loss = model(part(batch))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        learner.criterion.advance_epoch()
    return learner


def facts(criterion):
    state = criterion.state_dict()
    return {k: v.clone() for k, v in state.items() if "optimizer" not in k}


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
def on_two_ranks(tmp_path):
    def run(work, world=WORLD):
        context = multiprocessing.get_context("fork")
        queue = context.Queue()
        rendezvous = f"file://{tmp_path / 'rendezvous'}"
        processes = [context.Process(target=_process, args=(r, world, rendezvous, work, queue)) for r in range(world)]
        for process in processes:
            process.start()
        results = dict(queue.get(timeout=120) for _ in processes)
        for process in processes:
            process.join(60)
        for result in results.values():
            assert not isinstance(result, str), result
        return [pickle.loads(results[rank]) for rank in range(world)]

    return run


def under_ddp(rank):
    learner = Learner()
    model = nn.parallel.DistributedDataParallel(learner)
    train(model, learner, lambda batch: batch[rank::WORLD])
    return facts(learner.criterion), learner.network.weight.detach().clone()


def under_fsdp(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    learner = Learner()
    fully_shard(learner, mesh=init_device_mesh("cpu", (WORLD,)))
    train(learner, learner, lambda batch: batch[rank::WORLD])
    return facts(learner.criterion), learner.network.weight.full_tensor().detach().clone()


@pytest.mark.parametrize("wrapped", [under_ddp, under_fsdp])
def test_inside_the_wrapped_module_two_ranks_are_one_process_on_the_global_batches(wrapped, on_two_ranks):
    alone = Learner()
    train(alone, alone, lambda batch: batch)
    expected = facts(alone.criterion)
    (first, weight), (second, other_weight) = on_two_ranks(wrapped)
    assert expected["terms.progressive.targets.known"].all()
    start = Learner().criterion.state_dict()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name  # the same on both, bit for bit
        tolerance = 1e-3 if value.dtype == torch.float16 else 1e-5
        torch.testing.assert_close(value, expected[name], rtol=tolerance, atol=tolerance, msg=name)
    moved = [name for name in first if "discriminator" in name and not torch.equal(first[name], start[name])]
    assert len(moved) == 3  # all but the last bias, which cancels in the Wasserstein loss
    assert torch.equal(weight, other_weight)
    torch.testing.assert_close(weight, alone.network.weight, rtol=1e-4, atol=1e-5)


def uneven(rank):
    """Rank 0 writes three rows, rank 1 five, one of which rank 0 has written too; in epoch 2 rank 1 writes nothing."""
    results = []
    for store in (CachedTargets(N, C), EMATargets(N, C, decay=0.5), CachedTargets(N, C, top_k=2)):
        written = {0: [0, 1, 2], 1: [2, 9, 11, 13, 15]}[rank]
        store.write(torch.tensor(written), torch.eye(C)[[rank] * len(written)])
        store.advance_epoch()
        if rank == 0:
            store.write(torch.tensor([15]), torch.eye(C)[[2]])
        store.advance_epoch()
        results.append(store.read(torch.arange(N)))
    return results


def test_uneven_ranks_and_one_that_wrote_nothing_exchange_their_rows(on_two_ranks):
    first, second = on_two_ranks(uneven)
    for (probs, known), (other_probs, other_known), ema in zip(first, second, (False, True, False), strict=True):
        assert torch.equal(probs, other_probs)
        assert torch.equal(known, other_known)
        assert known.nonzero().flatten().tolist() == [0, 1, 2, 9, 11, 13, 15]
        assert probs[[0, 1]].argmax(-1).tolist() == [0, 0]
        assert probs[[2, 9, 11, 13]].argmax(-1).tolist() == [1, 1, 1, 1]  # of two ranks the higher one wins
        assert probs[15].tolist() == ([0, 0.5, 0.5] if ema else [0, 0, 1])


def chunked(rank):
    from aikd_losses import _distributed

    _distributed.CHUNK_BYTES = 1  # a row at a time
    return uneven(rank)


def test_a_chunked_exchange_is_the_same(on_two_ranks):
    (first, _), (second, _) = on_two_ranks(uneven), on_two_ranks(chunked)
    for (probs, known), (other_probs, other_known) in zip(first, second, strict=True):
        assert torch.equal(probs, other_probs)
        assert torch.equal(known, other_known)


def within(chunk_bytes):
    def work(rank):
        from aikd_losses import _distributed

        _distributed.CHUNK_BYTES = chunk_bytes
        received, all_gather = [], dist.all_gather

        def counting(tensors, *args, **kwargs):
            received.append(tensors[0].numel() * tensors[0].element_size())
            all_gather(tensors, *args, **kwargs)

        dist.all_gather = counting
        store = CachedTargets(N, C)
        written = [0, 1, 2] if rank == 0 else [2, 9, 11, 13, 15]
        store.write(torch.tensor(written), torch.eye(C)[[rank] * len(written)])
        store.advance_epoch()
        return received

    return work


@pytest.mark.parametrize(("chunk_bytes", "lengths"), [(1, [1, 1, 1, 1, 1]), (60, [2, 2, 1]), (149, [4, 1]), (150, [5])])
def test_what_is_received_at_a_time_is_bounded_and_sent_in_as_few_chunks_as_that_allows(
    chunk_bytes, lengths, on_two_ranks
):
    # A row: the id (8 bytes), three classes in float16 (6) and whether it is known (1), from each of two ranks.
    expected = [8] + [length * size for length in lengths for size in (8, 6, 1)]  # after how many there are
    assert on_two_ranks(within(chunk_bytes)) == [expected, expected]


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
    from aikd_losses._distributed import Ranks

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


def test_ranks_with_unequal_batches_take_the_step_of_the_joint_one(on_two_ranks):
    (value, first), (other_value, second) = on_two_ranks(of_unequal_size)
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


def in_one_file(path):
    """Each rank writes rows of its own, and one that both write, into the file that they share."""

    def work(rank):
        store = CachedTargets(N, C, path=path)
        seen = []
        for epoch in range(3):
            written = [epoch, 8 + rank]
            store.write(torch.tensor(written), torch.eye(C)[[(rank + epoch) % C] * 2])
            store.advance_epoch()
            dist.barrier()
            seen.append(tuple(x.clone() for x in store.read(torch.arange(N))))
            seen.append(int(store._file_state))
            dist.barrier()
        return seen

    return work


@pytest.mark.parametrize("shared", [True, False])
def test_ranks_that_share_a_file_or_have_one_each_all_hold_what_both_wrote(shared, on_two_ranks, tmp_path):
    if shared:
        first, second = on_two_ranks(in_one_file(tmp_path / "rows"))
    else:
        first, second = on_two_ranks(lambda rank: in_one_file(tmp_path / f"rows {rank}")(rank))
    for epoch in range(3):
        for probs, known in (first[2 * epoch], second[2 * epoch]):
            assert known.nonzero().flatten().tolist() == [*range(epoch + 1), 8, 9]
            assert probs[[8, 9]].argmax(-1).tolist() == [epoch % C, (1 + epoch) % C]
        assert torch.equal(first[2 * epoch][0], second[2 * epoch][0])
        assert first[2 * epoch + 1] == second[2 * epoch + 1] == 0  # whole
    assert CachedTargets(N, C, path=tmp_path / ("rows" if shared else "rows 1")).read(torch.arange(3))[1].all()


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


def test_a_group_of_ranks_trains_as_if_there_were_no_others(on_two_ranks, tmp_path):
    nothing, *both = on_two_ranks(in_a_group_of_two(tmp_path / "rows"), world=3)
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
