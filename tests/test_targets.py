"""The stores: what is kept, where, and what is refused."""

from __future__ import annotations

import copy
import errno
import gc
import json
import multiprocessing
import os
import pickle
import re
import signal
import time

import pytest
import torch

from aikd_losses import (
    AdversarialDistributionLoss,
    CachedTargets,
    EMATargets,
    LossStack,
    MLPDiscriminator,
    ProgressiveKD,
    TargetStore,
    _mapped,
)

N, C = 10, 4
STORES = {
    "cached": lambda **kw: CachedTargets(N, C, **kw),
    "top_k": lambda **kw: CachedTargets(N, C, top_k=2, **kw),
    "ema": lambda **kw: EMATargets(N, C, decay=0.5, **kw),
}


def rows(*seeds):
    return torch.stack([torch.randn(C, generator=torch.Generator().manual_seed(s)).softmax(-1) for s in seeds])


def contents(store):
    return {name: value.clone() for name, value in store.state_dict().items()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_ours_are_target_stores():
    for build in STORES.values():
        assert isinstance(build(), TargetStore)


@pytest.mark.parametrize("build", STORES.values(), ids=STORES)
def test_a_row_that_was_never_written_is_zero_and_not_known(build):
    store = build()
    store.write(torch.tensor([3]), rows(0))
    probs, known = store.read(torch.tensor([2, 3]))
    assert known.tolist() == [False, True]
    assert probs[0].tolist() == [0.0] * C
    assert probs.dtype == torch.float32


@pytest.mark.parametrize("build", STORES.values(), ids=STORES)
def test_of_equal_ids_in_one_write_the_last_kept_one_wins(build):
    many, one = build(dtype=torch.float32), build(dtype=torch.float32)
    many.write(torch.tensor([5, 1, 5, 5, 1]), rows(0, 1, 2, 3, 4), keep=torch.tensor([True, True, True, False, False]))
    one.write(torch.tensor([5, 1]), rows(2, 1))
    assert_same(contents(many), contents(one))


@pytest.mark.parametrize("build", STORES.values(), ids=STORES)
def test_a_dropped_row_stays_as_it_was(build):
    store = build()
    store.write(torch.tensor([5]), rows(0))
    before = contents(store)
    store.write(torch.tensor([5, 6]), rows(1, 2), keep=torch.tensor([False, False]))
    assert_same(contents(store), before)


@pytest.mark.parametrize("build", STORES.values(), ids=STORES)
def test_of_a_dropped_row_neither_the_id_nor_the_row_has_to_be_one(build):
    many, one = build(), build()
    dropped = torch.tensor([False, True, False, False])
    many.write(torch.tensor([-100, 1, N, 2]), torch.cat([rows(0, 1), -rows(2), torch.nan * rows(3)]), keep=dropped)
    one.write(torch.tensor([1]), rows(1))
    assert_same(contents(many), contents(one))


def test_the_newest_prediction_replaces_the_one_before():
    store = CachedTargets(N, C, dtype=torch.float32)
    store.write(torch.tensor([5, 6]), rows(0, 1))
    store.write(torch.tensor([6]), rows(2))
    assert torch.equal(store.read(torch.tensor([5, 6]))[0], rows(0, 2))


def test_bytes_a_sample():
    wide = CachedTargets(N, 1000, top_k=16)
    assert wide.rows.element_size() * 16 + wide.classes.element_size() * 16 == 64  # 82 MB for ImageNet-1k
    assert CachedTargets(N, 200, top_k=16).classes.dtype == torch.uint8
    assert CachedTargets(N, 40_000, top_k=16).classes.dtype == torch.int32
    assert CachedTargets(N, 1000).rows.element_size() == 2


@pytest.mark.parametrize(
    ("num_classes", "dtype"),
    [(256, torch.uint8), (257, torch.int16), (32768, torch.int16), (32769, torch.int32)],
    ids=["256", "257", "32768", "32769"],
)
def test_the_last_class_fits_the_type_of_the_classes_which_is_the_smallest(num_classes, dtype):
    store = CachedTargets(2, num_classes, top_k=1)
    assert store.classes.dtype == dtype
    probs = torch.zeros(1, num_classes)
    probs[0, -1] = 1.0
    store.write(torch.tensor([0]), probs)
    assert int(store.read(torch.tensor([0]))[0].argmax()) == num_classes - 1


# ---------------------------------------------------------------------------------------------------------- in a file


@pytest.mark.parametrize("build", STORES.values(), ids=STORES)
def test_a_file_is_created_and_reopened_with_what_it_holds(build, tmp_path):
    path = tmp_path / "targets.bin"
    memory, mapped = build(), build(path=path)
    for store in (memory, mapped):
        store.write(torch.tensor([1, 7]), rows(0, 1))
        store.write(torch.tensor([7]), rows(2))
    assert_same(contents(mapped), contents(memory))
    again = build(path=path)  # while the first one has it open
    assert_same(contents(again), contents(memory))
    again.write(torch.tensor([2]), rows(3))
    assert mapped.read(torch.tensor([2]))[1].item()  # the same file
    assert mapped.known.device.type == "cpu"


def other_stores(path):
    return {
        "num_samples=10, not 11": lambda: CachedTargets(N + 1, C, path=path),
        "num_classes=4, not 5": lambda: CachedTargets(N, C + 1, path=path),
        "dtype='torch.float16', not 'torch.float32'": lambda: CachedTargets(N, C, dtype=torch.float32, path=path),
        "top_k=None, not 2": lambda: CachedTargets(N, C, top_k=2, path=path),
    }


@pytest.mark.parametrize("difference", other_stores(None))
def test_a_file_of_another_store_is_refused_and_left_as_it_is(difference, tmp_path):
    path = tmp_path / "targets.bin"
    CachedTargets(N, C, path=path).write(torch.tensor([1]), rows(0))
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"`path` must hold the store that is asked for") as error:
        other_stores(path)[difference]()
    assert str(error.value) == (
        f"`path` must hold the store that is asked for; {str(path)!r} has {difference}. Build the store with the file's "
        "settings, or pass another path."
    )
    assert path.read_bytes() == before


def test_every_difference_to_the_file_is_named_and_a_header_with_more_in_it_is_another_one(tmp_path):
    path = tmp_path / "targets.bin"
    CachedTargets(N, C, path=path)
    with pytest.raises(ValueError, match=r"targets\.bin' has num_samples=10, not 11, num_classes=4, not 5\. Build"):
        CachedTargets(N + 1, C + 1, path=path)
    content = path.read_bytes()
    header = json.dumps({**json.loads(content[:4096]), "by": "someone"}).encode().ljust(4096)
    path.write_bytes(header + content[4096:])
    with pytest.raises(ValueError, match=r"targets\.bin' has another header\. Build"):
        CachedTargets(N, C, path=path)


def test_a_file_is_a_page_that_says_what_it_holds_and_then_the_columns_a_page_each(tmp_path):
    path = tmp_path / "targets.bin"
    store = CachedTargets(N, C, path=path, dtype=torch.float32)
    store.write(torch.arange(N), rows(*range(N)))
    store.advance_epoch()
    content = path.read_bytes()
    assert len(content) == 4 * 4096  # the header, rows, known and whether it is whole
    assert content[:1] == b"{"
    facts = {"num_samples": N, "num_classes": C, "dtype": "torch.float32", "top_k": None}
    assert json.loads(content[:4096]) == {"format": "aikd-losses targets 2", **facts}
    assert content[4096:8192] == rows(*range(N)).numpy().tobytes().ljust(4096, b"\0")
    assert content[8192:12288] == (b"\1" * N).ljust(4096, b"\0")
    assert content[12288:] == bytes(4096)


def test_a_file_is_made_beside_its_place_which_can_be_linked_to(tmp_path, monkeypatch):
    sources, link = [], os.link
    monkeypatch.setattr(os, "link", lambda source, path: (sources.append(source), link(source, path)))
    CachedTargets(N, C, path=tmp_path / "targets.bin")
    (source,) = sources
    assert re.fullmatch(re.escape(f"{tmp_path}/targets.bin.") + "[^/.]+", source)


@pytest.mark.parametrize("content", [b"", b"\x00" * 9000, b"[1, 2]", b'{"format": "something else"}'])
def test_a_file_of_something_else_is_refused_and_left_as_it_is(content, tmp_path):
    path = tmp_path / "notes.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"`path` must be a file of targets; .*notes.txt' is something else"):
        CachedTargets(N, C, path=path)
    assert path.read_bytes() == content


@pytest.mark.parametrize("change", [-1, 1])
def test_a_file_of_another_length_is_refused_and_left_as_it_is(change, tmp_path):
    path = tmp_path / "targets.bin"
    CachedTargets(N, C, path=path)
    content = path.read_bytes()
    content = content[:change] if change < 0 else content + b"\x00"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"`path` must be a whole file of \d+ bytes") as error:
        CachedTargets(N, C, path=path)
    assert str(error.value) == (
        f"`path` must be a whole file of 16384 bytes; {str(path)!r} has {16384 + change}: it was cut off. Delete it and load "
        "the rows from a checkpoint."
    )
    assert path.read_bytes() == content


def _open_and_write(path, barrier, i):
    barrier.wait()
    store = CachedTargets(N, C, path=path)
    store.write(torch.tensor([i]), rows(i))
    barrier.wait()  # a process that has the file open is not one that was killed


def test_processes_that_create_a_file_at_once_share_one(tmp_path):
    path = tmp_path / "targets.bin"
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(4)
    workers = [context.Process(target=_open_and_write, args=(path, barrier, i)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert CachedTargets(N, C, path=path).known.tolist() == [True] * 4 + [False] * 6
    assert [p.name for p in tmp_path.iterdir()] == ["targets.bin"]


def _killed_in_an_epoch(path, orphan, said):
    store = CachedTargets(N, C, path=path)
    store.write(torch.arange(N), rows(*range(N)))
    store.advance_epoch()
    store.write(torch.tensor([1]), rows(20))
    if orphan and os.fork() == 0:  # a worker that outlives the process
        said.send(os.getpid())
        time.sleep(60)
    os.kill(os.getpid(), signal.SIGKILL)


def killed_in_an_epoch(path, orphan=False):
    """Returns the process that outlived it, if there is one."""
    hears, says = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_killed_in_an_epoch, args=(path, orphan, says))
    process.start()
    _, status = os.waitpid(process.pid, 0)  # `join` would wait for the orphan
    assert os.WTERMSIG(status) == signal.SIGKILL
    return hears.recv() if orphan else None


@pytest.fixture(params=[False, True], ids=["", "with-an-orphan"])
def interrupted(request, tmp_path):
    """The file of a process that was killed in its second epoch."""
    orphan = killed_in_an_epoch(tmp_path / "targets.bin", request.param)
    yield tmp_path / "targets.bin"
    if orphan is not None:
        os.kill(orphan, signal.SIGKILL)


def refuses(store):
    index = torch.tensor([3])
    discriminator = MLPDiscriminator(C)
    adversarial = AdversarialDistributionLoss(discriminator, optimizer=torch.optim.Adam(discriminator.parameters()))
    stack = LossStack({"adversarial": adversarial, "progressive": ProgressiveKD(store)})
    given = dict(student_logits=rows(0), teacher_logits=rows(1), target=index, index=index)
    weights = [p.clone() for p in discriminator.parameters()]
    calls = [
        lambda: store.read(index),
        lambda: store.write(index, rows(0)),
        lambda: store.advance_epoch(),
        lambda: store.state_dict(),
        lambda: copy.deepcopy(store),
        lambda: stack(**given),
        lambda: stack.update(**given),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match="left half written") as error:
            call()
        assert str(error.value) == (
            f"`path` {store.path!r} was left half written: a process was killed between two `advance_epoch`, so that rows of "
            "two epochs are in it and some may be torn. Load a checkpoint of the store (`load_state_dict`), or delete the file "
            "to start without history."
        )
    assert all(map(torch.equal, weights, discriminator.parameters()))
    return True


def test_a_file_that_was_being_written_when_its_process_was_killed_is_noticed(interrupted):
    before = interrupted.read_bytes()
    first, second = CachedTargets(N, C, path=interrupted), CachedTargets(N, C, path=interrupted)
    for store in (first, second, pickle.loads(pickle.dumps(first))):
        assert refuses(store)
    changed = [i for i, (a, b) in enumerate(zip(before, interrupted.read_bytes(), strict=True)) if a != b]
    assert len(changed) == 1  # it is noted, for the next one too
    del first, second, store
    gc.collect()
    assert refuses(CachedTargets(N, C, path=interrupted))


def test_who_reads_a_file_does_not_hide_that_its_writer_was_killed(tmp_path):
    path = tmp_path / "targets.bin"
    reader = CachedTargets(N, C, path=path)
    killed_in_an_epoch(path)
    assert refuses(CachedTargets(N, C, path=path))
    assert refuses(reader)  # from now on


def test_a_checkpoint_makes_an_interrupted_file_whole(interrupted):
    kept = CachedTargets(N, C)
    kept.write(torch.arange(N), rows(*range(N)))
    first, second = CachedTargets(N, C, path=interrupted), CachedTargets(N, C, path=interrupted)
    first.load_state_dict(kept.state_dict())
    for store in (first, second):
        assert_same(contents(store), contents(kept))
        assert torch.equal(store.read(torch.arange(N))[0], kept.read(torch.arange(N))[0])
    del first, second, store
    gc.collect()
    killed_in_an_epoch(interrupted)
    assert refuses(CachedTargets(N, C, path=interrupted))  # once more


def test_a_load_that_was_interrupted_is_noticed(tmp_path, monkeypatch):
    path = tmp_path / "targets.bin"
    store, state = CachedTargets(N, C, path=path), CachedTargets(N, C).state_dict()
    monkeypatch.setattr(store, "_after_load", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        store.load_state_dict(state)
    assert refuses(store)
    assert refuses(CachedTargets(N, C, path=path))


def write_and_wait(path, written, end):
    store = CachedTargets(N, C, path=path)
    store.write(torch.tensor([1]), rows(0))
    written.set()
    end.wait(60)


def test_a_file_whose_writer_lives_or_came_to_its_end_was_not_interrupted(tmp_path):
    path = tmp_path / "targets.bin"
    context = multiprocessing.get_context("fork")
    written, end = context.Event(), context.Event()
    worker = context.Process(target=write_and_wait, args=(path, written, end))
    worker.start()
    assert written.wait(60)
    assert CachedTargets(N, C, path=path).read(torch.tensor([1]))[1].item()
    end.set()
    worker.join(60)
    assert CachedTargets(N, C, path=path).read(torch.tensor([1]))[1].item()


def test_a_writer_that_leaves_does_not_speak_for_another_one(tmp_path):
    one, other = (CachedTargets(N, C, path=tmp_path / "targets.bin") for _ in range(2))
    for store in (one, other):
        store.write(torch.tensor([1]), rows(0))
    state = int(other._file._state)
    del one, store
    gc.collect()
    assert int(other._file._state) == state == _mapped.WRITING
    other.advance_epoch()
    assert int(other._file._state) == _mapped.WHOLE


def test_a_store_that_was_unpickled_in_the_middle_of_an_epoch_says_that_it_writes(tmp_path):
    store = CachedTargets(N, C, path=tmp_path / "targets.bin")
    store.write(torch.tensor([1]), rows(0))
    pickled = pickle.dumps(store)
    store.advance_epoch()
    again = pickle.loads(pickled)
    again.write(torch.tensor([2]), rows(0))
    assert int(store._file._state) == _mapped.WRITING


def test_a_forked_process_does_not_speak_for_its_parent_and_can_write_itself(tmp_path):
    store = CachedTargets(N, C, path=tmp_path / "targets.bin")
    store.write(torch.tensor([1]), rows(0))
    lock = store._file._lock
    child = os.fork()
    if child == 0:
        let_go = lock.descriptor is None
        store.write(torch.tensor([2]), rows(1))
        os._exit(0 if let_go and lock.descriptor is not None else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert lock.descriptor is not None
    store.advance_epoch()
    assert lock.descriptor is None
    assert store.read(torch.tensor([1, 2]))[1].all()


class Unlockable:
    """A file system without locks."""

    LOCK_EX, LOCK_NB, LOCK_SH = 2, 4, 1

    @staticmethod
    def flock(*args):
        raise OSError(errno.ENOLCK, "No locks available")


@pytest.mark.parametrize("locks", [None, Unlockable], ids=["windows", "no-locks"])
def test_where_files_cannot_be_locked_one_that_is_being_written_counts_as_interrupted(locks, tmp_path, monkeypatch):
    monkeypatch.setattr(_mapped, "fcntl", locks)
    path = tmp_path / "targets.bin"
    store = CachedTargets(N, C, path=path)
    assert not CachedTargets(N, C, path=path).read(torch.arange(N))[1].any()
    store.write(torch.tensor([1]), rows(0))
    store.advance_epoch()
    assert CachedTargets(N, C, path=path).read(torch.tensor([1]))[1].item()
    store.write(torch.tensor([2]), rows(0))
    assert refuses(CachedTargets(N, C, path=path))


@pytest.mark.parametrize("replaced", [False, True])
def test_a_file_that_was_deleted_or_replaced_is_not_written_in_vain(replaced, tmp_path):
    path = tmp_path / "targets.bin"
    store = CachedTargets(N, C, path=path)
    path.unlink()
    if replaced:
        CachedTargets(N, C, path=path)
    with pytest.raises(
        RuntimeError, match=r"`path` '.*' was deleted or replaced after this store had mapped it: what it"
    ):
        store.write(torch.tensor([1]), rows(0))


def test_the_identity_of_a_file_is_that_of_the_file_on_its_machine(tmp_path, monkeypatch):
    """The machine is told by the number of its start or, where there is none, of its network card."""

    def identities():
        return [CachedTargets(N, C, path=tmp_path / name)._file.identity for name in ("a", "also a", "b")]

    CachedTargets(N, C, path=tmp_path / "a")
    os.link(tmp_path / "a", tmp_path / "also a")
    seen = [identities()]
    for content in ("one", "other"):
        (tmp_path / "boot").write_text(content)
        monkeypatch.setattr(_mapped, "BOOT", tmp_path / "boot")
        seen.append(identities())
    monkeypatch.setattr(_mapped, "BOOT", tmp_path / "nowhere")
    for card in (1, 2):
        monkeypatch.setattr(_mapped.uuid, "getnode", lambda card=card: card)
        seen.append(identities())
    assert all(a == also_a for a, also_a, _ in seen)
    different = {number for a, _, b in seen for number in (a, b)}
    assert len(different) == 2 * len(seen)
    assert all(-(2**63) <= number < 2**63 for number in different)


def test_a_file_of_another_version_is_named_as_such(tmp_path):
    path = tmp_path / "targets.bin"
    CachedTargets(N, C, path=path)
    content = path.read_bytes().replace(b"aikd-losses targets 2", b"aikd-losses targets 1")
    path.write_bytes(content)
    with pytest.raises(
        ValueError, match=r"must be a file of this version's format, 'aikd-losses targets 2'; .* targets 1'"
    ):
        CachedTargets(N, C, path=path)
    assert path.read_bytes() == content


def test_a_file_store_is_saved_without_a_copy_and_loads_anywhere(tmp_path):
    store = CachedTargets(N, C, top_k=2, path=tmp_path / "targets")
    store.write(torch.tensor([1]), rows(0))
    assert [x.data_ptr() for x in store.state_dict().values()] == [
        x.data_ptr() for x in (store.rows, store.classes, store.known)
    ]
    torch.save(store.state_dict(), tmp_path / "checkpoint")
    assert (tmp_path / "checkpoint").stat().st_size < 10_000  # no column drags the whole file along
    memory = CachedTargets(N, C, top_k=2)
    memory.load_state_dict(torch.load(tmp_path / "checkpoint", weights_only=True))
    assert_same(contents(memory), contents(store))


def test_a_missing_folder_is_an_error_of_the_system(tmp_path):
    with pytest.raises(FileNotFoundError):
        CachedTargets(N, C, path=tmp_path / "nowhere" / "targets.bin")


# ---------------------------------------------------------------------------------------------------- state and copies


@pytest.mark.parametrize("build", STORES.values(), ids=STORES)
@pytest.mark.parametrize("mapped", [False, True])
def test_the_state_survives_a_file_and_safetensors(build, mapped, tmp_path):
    from safetensors.torch import load_file, save_file

    store = build(path=tmp_path / "rows.bin") if mapped else build()
    store.write(torch.tensor([1, 7]), rows(0, 1))
    torch.save(store.state_dict(), tmp_path / "a.pt")
    save_file({k: v.clone() for k, v in store.state_dict().items()}, tmp_path / "a.safetensors")
    for state in (torch.load(tmp_path / "a.pt", weights_only=True), load_file(tmp_path / "a.safetensors")):
        fresh = build()
        fresh.load_state_dict(state)
        assert_same(contents(fresh), contents(store))


@pytest.mark.parametrize(
    "other",
    [CachedTargets(N + 1, C), CachedTargets(N, C + 1), CachedTargets(N, C, dtype=torch.float32)],
    ids=["samples", "classes", "dtype"],
)
def test_a_checkpoint_of_another_store_is_refused_and_nothing_is_loaded(other):
    store = CachedTargets(N, C)
    store.write(torch.tensor([1]), rows(0))
    before = contents(store)
    with pytest.raises(RuntimeError, match=r"`rows` in the checkpoint is torch.float\d+ of shape .*; here it is"):
        store.load_state_dict(other.state_dict())
    assert_same(contents(store), before)


def test_a_checkpoint_with_another_top_k_is_refused_and_changes_nothing():
    kept, whole = CachedTargets(N, C, top_k=C, dtype=torch.float32), CachedTargets(N, C, dtype=torch.float32)
    for store in (kept, whole):
        store.write(torch.tensor([2]), rows(5))
    for one, other, message in (
        (kept, whole, r"Missing key\(s\) in state_dict: \"classes\""),
        (
            whole,
            kept,
            r"`classes` is in the checkpoint, and this object has none\. Build this object with the settings",
        ),
    ):
        fresh, empty = copy.deepcopy(one), contents(one)
        other.write(torch.tensor([1]), rows(6))
        with pytest.raises(RuntimeError, match=message):
            fresh.load_state_dict(other.state_dict())
        assert_same(contents(fresh), empty)
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"classes\""):
        CachedTargets(N, C, top_k=2).load_state_dict(CachedTargets(N, C).state_dict())


@pytest.mark.parametrize("build", STORES.values(), ids=STORES)
@pytest.mark.parametrize("mapped", [False, True])
def test_a_deep_copy_is_independent(build, mapped, tmp_path):
    path = tmp_path / "rows.bin"
    store = build(path=path) if mapped else build()
    store.write(torch.tensor([1]), rows(0))
    clone = copy.deepcopy(store)
    before = contents(store)
    assert_same(contents(clone), before)
    clone.write(torch.tensor([1, 2]), rows(3, 4))
    assert_same(contents(store), before)
    assert clone.path is None


def test_what_shares_a_store_or_its_rows_shares_their_copies():
    store = CachedTargets(N, C)
    first, second, table = copy.deepcopy([store, ProgressiveKD(store), store.rows])
    assert first is second.targets
    assert first is not store
    assert table is first.rows


@pytest.mark.parametrize("build", STORES.values(), ids=STORES)
def test_a_pickle_holds_the_rows_or_refers_to_the_file(build, tmp_path):
    path = tmp_path / "rows.bin"
    for store in (build(), build(path=path)):
        store.write(torch.tensor([1]), rows(0))
        again = pickle.loads(pickle.dumps(store))
        assert_same(contents(again), contents(store))
        again.write(torch.tensor([2]), rows(1))
        assert store.known[2].item() == (store.path is not None)


def test_a_store_follows_to_in_device_alone_unless_its_place_was_given(tmp_path):
    free, pinned, mapped = (
        CachedTargets(N, C),
        CachedTargets(N, C, device="cpu"),
        CachedTargets(N, C, path=tmp_path / "x"),
    )
    for store in (free, pinned, mapped):
        store.to("meta")
        store.double()
        assert store.rows.dtype == torch.float16
    assert free.rows.is_meta
    assert free.known.is_meta
    assert not pinned.rows.is_meta
    assert not mapped.rows.is_meta


def test_a_store_made_on_meta_becomes_an_empty_one():
    with torch.device("meta"):
        store = CachedTargets(N, C)
    assert store.rows.is_meta
    store.to_empty(device="cpu")
    assert not store.read(torch.arange(N))[1].any()


def test_rows_shared_in_memory_are_shared():
    store = CachedTargets(N, C)
    store.double()
    assert not store.rows.is_shared()
    store.share_memory()
    assert store.rows.is_shared()


# ------------------------------------------------------------------------------------------------------ through a loss


@pytest.mark.parametrize("build", STORES.values(), ids=STORES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_row_with_nan_or_inf_is_not_written_and_spoils_no_other(build, bad):
    spoilt, clean = ProgressiveKD(build()), ProgressiveKD(build())
    logits = torch.randn(4, C)
    index = torch.tensor([0, 3, 3, 5])
    for loss in (spoilt, clean):
        loss.update(torch.ones(1, C), index=torch.tensor([5]))
    clean.update(logits[:2], index=index[:2])
    logits[2:, 1] = bad  # the second of the id 3, and the only one of the id 5
    spoilt.update(logits, index=index)
    assert_same(contents(spoilt.targets), contents(clean.targets))


def test_a_class_at_minus_infinity_is_written_with_probability_zero():
    loss = ProgressiveKD(CachedTargets(N, C))
    loss.update(torch.tensor([[0.0, 0.0, -torch.inf, 0.0]]), index=torch.tensor([1]))
    probs, known = loss.targets.read(torch.tensor([1]))
    assert known.item()
    torch.testing.assert_close(probs, torch.tensor([[1, 1, 0, 1]]) / 3, rtol=1e-3, atol=0)


class Recording:
    """A user's own store: what was asked of it."""

    def __init__(self):
        self.reads, self.writes, self.advances = [], [], 0

    def read(self, index):
        self.reads.append(index)
        return torch.full((len(index), C), 1 / C), torch.ones(len(index), dtype=torch.bool)

    def write(self, index, probs):
        self.writes.append((index, probs))

    def advance_epoch(self):
        self.advances += 1


def test_a_copy_of_a_store_in_a_file_can_be_saved(tmp_path):
    store = CachedTargets(N, C, top_k=2, path=tmp_path / "targets")
    store.write(torch.tensor([1]), torch.full((1, C), 1 / C))
    torch.save(copy.deepcopy(store).state_dict(), tmp_path / "checkpoint")
    saved = torch.load(tmp_path / "checkpoint", weights_only=True)
    assert saved["known"].nonzero().tolist() == [[1]]
    assert {name: x.shape for name, x in saved.items()} == {name: x.shape for name, x in store.state_dict().items()}


def test_a_checkpoint_is_not_lost_in_a_store_without_memory():
    with torch.device("meta"):
        store = CachedTargets(N, C)
    full = CachedTargets(N, C)
    full.write(torch.arange(N), torch.full((N, C), 1 / C))
    for assign in (False, True):
        with pytest.raises(
            RuntimeError, match=r"`rows` is on the meta device .* Call `.to_empty\(device=...\)` first."
        ):
            store.load_state_dict(full.state_dict(), assign=assign)
    store.to_empty(device="cpu").load_state_dict(full.state_dict())
    assert store.known.all()


def test_a_store_of_the_users_own_gets_flat_ids_without_masked_and_spoilt_rows():
    store = Recording()
    loss = ProgressiveKD(store, alpha=0.5, class_dim=-1)
    logits = torch.randn(2, 3, C)
    logits[1, 2] = torch.nan
    index = torch.tensor([[4, 1, -100], [7, 4, 8]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    loss.update(logits, index=index, mask=mask)
    (ids, probs), *_ = store.writes
    assert ids.tolist() == [4, 1, 7, 4]
    torch.testing.assert_close(probs, logits.softmax(-1).flatten(0, 1)[[0, 1, 3, 4]])
    value = loss(logits[:1], torch.zeros(1, 3, dtype=torch.int64), index=index[:1], mask=mask[:1])
    assert store.reads[0].tolist() == [4, 1]
    soft = torch.cat([0.5 * torch.eye(C)[:1] + 0.5 / C] * 2)
    torch.testing.assert_close(value, -(soft * logits[0, :2].log_softmax(-1)).sum(-1).mean())
    loss.advance_epoch()
    assert store.advances == 1


def test_a_complete_store_is_known_to_be_so_only_as_long_as_nothing_says_otherwise():
    store, ids = CachedTargets(3, 2), torch.arange(3)
    loss = ProgressiveKD(store)
    store.write(ids, torch.full((3, 2), 0.5))
    assert not store.complete  # nobody has looked
    store.advance_epoch()
    assert store.complete
    store.write(ids[:1], torch.tensor([[1.0, 0.0]]))
    assert store.complete
    assert store.read(ids)[1].all()
    assert not copy.deepcopy(store).to("meta").complete
    store.known[1] = False  # by hand
    assert not store.complete
    s = torch.randn(3, 2)
    values = ProgressiveKD(store, reduction="none")(s, torch.zeros(3, dtype=torch.int64), index=ids)
    plain = torch.nn.functional.cross_entropy(s[1], torch.tensor(0))
    torch.testing.assert_close(values[1], plain)
    other = CachedTargets(3, 2)
    loss.targets.write(ids, torch.full((3, 2), 0.5))
    other.load_state_dict(store.state_dict())
    assert other.complete  # whoever loads looks
    assert not CachedTargets(3, 2).complete


@pytest.mark.parametrize("complete", [False, True])
def test_rows_of_a_complete_store_are_blended_as_others_are_and_alone_by_default(complete):
    store = CachedTargets(N, C, dtype=torch.float32)
    loss = ProgressiveKD(store, alpha=1.0)
    store.write(torch.arange(N), rows(*range(N)))
    if complete:
        store.advance_epoch()
    assert store.complete == complete
    s, index, partner = torch.randn(3, C), torch.tensor([1, 2, 3]), torch.tensor([4, 5, 6])
    first, second = rows(1, 2, 3), rows(4, 5, 6)
    given = {"index": index, "partner_index": partner}
    for mix, expected in ((None, first), (0.3, 0.3 * first + 0.7 * second)):
        value = loss(s, **given) if mix is None else loss(s, **given, mix_lambda=mix)
        torch.testing.assert_close(value, -(expected * s.log_softmax(-1)).sum(-1).mean())
    mask = torch.tensor([True, False, True])
    hidden = {name: x.masked_fill(~mask, N) for name, x in given.items()}  # no ids
    torch.testing.assert_close(
        loss(s, **hidden, mask=mask, mix_lambda=0.3),
        loss(s[mask], **{name: x[mask] for name, x in given.items()}, mix_lambda=0.3),
    )


@pytest.mark.parametrize("kind", [CachedTargets, EMATargets])
def test_the_last_of_equal_ids_wins_whatever_threads_write(kind):
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for _ in range(60):
            store, probs = kind(400, 1000), torch.randn(256, 1000).softmax(-1)
            index = torch.randperm(400)[:256]
            index[127] = index[255]
            store.write(index, probs)
            torch.testing.assert_close(store.rows[index[255]], probs[255].half(), rtol=0, atol=0)
    finally:
        torch.set_num_threads(threads)


def test_a_store_that_was_moved_copied_or_unpickled_looks_anew_whether_it_is_complete(tmp_path):
    store = CachedTargets(4, 3, path=tmp_path / "rows")
    store.write(torch.arange(4), torch.full((4, 3), 1 / 3))
    store.advance_epoch()
    store = CachedTargets(4, 3, path=tmp_path / "rows")
    store.advance_epoch()
    assert store.complete
    pickled = pickle.dumps(store)
    (tmp_path / "rows").unlink()
    assert not pickle.loads(pickled).complete
    store = CachedTargets(4, 3)
    store.write(torch.arange(4), torch.full((4, 3), 1 / 3))
    store.advance_epoch()
    assert store.complete
    assert not copy.deepcopy(store).complete
    assert not store.to("meta").to_empty(device="cpu").complete


def test_a_complete_store_is_read_for_sequences_too():
    loss = ProgressiveKD(CachedTargets(6, 3, dtype=torch.float32), class_dim=1)
    rows = torch.randn(6, 3).softmax(-1)
    loss.targets.write(torch.arange(6), rows)
    loss.targets.advance_epoch()
    s, index = torch.randn(2, 3, 3), torch.arange(6).view(2, 3)
    value = loss(s, index=index)
    expected = -0.5 * (rows.view(2, 3, 3) * s.movedim(1, -1).log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(value, expected)


def test_a_checkpoints_classes_are_checked_at_both_ends():
    store, other = (CachedTargets(4, 3, top_k=1) for _ in range(2))
    store.load_state_dict(other.state_dict())  # a new one's classes are all 0
    for wrong in (3, 4, 255):
        state = copy.deepcopy(other.state_dict())
        state["classes"][2] = wrong
        with pytest.raises(RuntimeError, match=r"`classes` in the checkpoint must be in 0\.\.2"):
            store.load_state_dict(state)
