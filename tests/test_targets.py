"""The stores: what is kept, where, and what is refused."""

from __future__ import annotations

import copy
import errno
import json
import multiprocessing
import os
import pickle
import signal
import stat
import struct
import time
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from seeds import generator
from torch.testing import assert_close

from aikd_losses import (
    AdversarialDistributionLoss,
    CachedTargets,
    EMATargets,
    LossStack,
    MLPDiscriminator,
    ProgressiveKD,
    TargetStore,
    _file,
)

N, C = 10, 4
STORES = {
    "cached": lambda **kw: CachedTargets(N, C, **kw),
    "top_k": lambda **kw: CachedTargets(N, C, top_k=2, **kw),
    "ema": lambda **kw: EMATargets(N, C, decay=0.5, **kw),
}
FORK = multiprocessing.get_context("fork")


@pytest.fixture(params=STORES)
def build(request):
    """A store of each kind."""
    return STORES[request.param]


@pytest.fixture
def path(tmp_path):
    if torch.get_default_device().type != "cpu":
        pytest.skip("about the CPU: a file is mapped into its memory, and forked processes cannot use a GPU")
    return tmp_path / "targets.bin"


@pytest.fixture(params=["memory", "file"])
def place(request):
    """Where a store is."""
    return {"path": request.getfixturevalue("path")} if request.param == "file" else {}


def rows(*seeds):
    return torch.stack([torch.randn(C, generator=generator(s)).softmax(-1) for s in seeds])


def contents(store):
    return {name: value.clone() for name, value in store.state_dict().items()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


# -------------------------------------------------------------------------------------------------------------- values


def test_a_row_that_was_never_written_is_zero_and_not_known(build, place):
    store = build(**place)
    assert isinstance(store, TargetStore)
    store.write(torch.tensor([3]), rows(0))
    probs, known = store.read(torch.tensor([2, 3]))
    assert known.tolist() == [False, True]
    assert probs[0].tolist() == [0.0] * C
    assert probs.dtype == torch.float32


KEPT = {  # ids, which of the rows written for them are kept, and which row each id then has
    "equal": ([5, 1, 5, 5, 1], [True, True, True, False, False], {5: 2, 1: 1}),
    "none": ([5, 6], [False, False], {}),
    "no ids": ([-100, 1, N, 2], [False, True, False, False], {1: 1}),
    "all": ([5, 6, 5], None, {6: 1, 5: 2}),
}


@pytest.mark.parametrize(("index", "keep", "left"), KEPT.values(), ids=KEPT)
def test_of_equal_ids_the_last_kept_row_wins_and_a_dropped_one_may_be_anything(index, keep, left, build, place):
    many, one = build(dtype=torch.float32, **place), build(dtype=torch.float32)
    for store in (many, one):
        store.write(torch.tensor([5]), rows(9))
    keep, probs = keep and torch.tensor(keep), rows(*range(len(index)))
    if keep is not None:
        probs[~keep] = torch.tensor([torch.nan, torch.inf, -1.0, 0.0])
    many.write(torch.tensor(index), probs, keep=keep)
    for i, row in left.items():
        one.write(torch.tensor([i]), rows(row))
    assert_same(contents(many), contents(one))


@pytest.mark.parametrize("kind", [CachedTargets, EMATargets])
def test_the_last_of_equal_ids_wins_whatever_threads_write(kind):
    torch.set_num_threads(2)  # until the next test
    for _ in range(60):
        store, probs = kind(400, 1000), torch.randn(256, 1000).softmax(-1)
        index = torch.randperm(400)[:256]
        index[127] = index[255]
        store.write(index, probs)
        assert_close(store.rows[index[255]], probs[255].half(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("num_classes", "dtype"),
    [(256, torch.uint8), (257, torch.int16), (32768, torch.int16), (32769, torch.int32)],
    ids=["256", "257", "32768", "32769"],
)
def test_a_row_takes_two_bytes_a_class_that_is_kept_and_its_number_in_the_smallest_type(num_classes, dtype):
    store = CachedTargets(2, num_classes, top_k=1)
    assert (store.rows.shape, store.classes.shape) == ((2, 1), (2, 1))
    assert (store.rows.element_size(), store.classes.dtype) == (2, dtype)
    probs = torch.zeros(1, num_classes)
    probs[0, -1] = 1.0
    store.write(torch.tensor([0]), probs)
    assert int(store.read(torch.tensor([0]))[0].argmax()) == num_classes - 1


# ---------------------------------------------------------------------------------------------------------- in a file


def test_a_file_is_created_and_reopened_with_what_it_holds(build, path):
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


@pytest.mark.parametrize("links", [True, False])
def test_a_file_appears_with_the_rights_of_any_other_and_leaves_nothing_beside_it(links, path, monkeypatch):
    def no_links(source, target):
        raise PermissionError(errno.EPERM, "Operation not permitted")  # what FAT says

    if not links:
        monkeypatch.setattr(os, "link", no_links)
    long = path.with_name("x" * 250)
    before = os.umask(0o027)
    try:
        CachedTargets(N, C, path=long).write(torch.tensor([1]), rows(0))
    finally:
        os.umask(before)
    assert CachedTargets(N, C, path=long).known.nonzero().tolist() == [[1]]
    assert stat.S_IMODE(long.stat().st_mode) == 0o640
    assert os.stat(long).st_blocks * 512 >= 3 * 4096  # it has the room that it will need
    assert list(path.parent.iterdir()) == [long]


@pytest.mark.parametrize("failing", ["posix_fallocate", "link"])
def test_a_file_that_cannot_be_made_is_not_there(failing, path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    for name in (failing, "rename"):
        monkeypatch.setattr(os, name, full)
    said = r"No space left on device \(`path` needs 12,288 bytes, [\d,]+ are free\)"
    with pytest.raises(OSError, match=f"{said}: {str(path)!r}") as error:
        CachedTargets(N, C, path=path)
    assert error.value.filename == str(path)
    assert list(path.parent.iterdir()) == []


def test_what_is_no_file_is_refused_in_a_sentence(path):
    os.mkfifo(path)
    path.with_name("dangling").symlink_to(path.with_name("nowhere"))
    is_not = "must be a file; .* is a folder, a pipe or a device"
    for name, error, said in (
        (path.name, ValueError, is_not),
        (".", ValueError, is_not),
        (
            "missing/folder",
            FileNotFoundError,
            r"No such file or directory \(`path` needs 12,288 bytes\): .*missing/folder",
        ),
        ("dangling", FileNotFoundError, "No such file or directory: .*dangling"),
        ("x" * 256, OSError, r"File name too long \(`path` needs 12,288 bytes, .* are free\): .*xxx"),
    ):
        with pytest.raises(error, match=said):
            CachedTargets(N, C, path=path.with_name("x").parent / name)
    assert {x.name for x in path.parent.iterdir()} == {path.name, "dangling"}


def test_what_a_process_left_that_was_killed_while_it_created_a_file_goes_with_the_next_creation(path):
    def killed(source, target):
        os.kill(os.getpid(), signal.SIGKILL)

    def create():
        os.link = killed
        CachedTargets(N, C, path=path)

    worker = FORK.Process(target=create)
    worker.start()
    worker.join(60)
    (left,) = path.parent.iterdir()
    CachedTargets(N, C, path=path)
    assert left.exists()  # it may be of another that is creating it now
    path.unlink()
    os.utime(left, (0, 0))
    CachedTargets(N, C, path=path)
    assert list(path.parent.iterdir()) == [path]


def test_rows_of_another_run_are_warned_of_unless_a_checkpoint_was_loaded(path):
    def update(loss):
        loss.update(torch.randn(1, C), index=torch.tensor([1]))
        loss.targets.advance_epoch()

    first = ProgressiveKD(CachedTargets(N, C, path=path))
    update(first)  # any warning is an error here
    rank = ProgressiveKD(CachedTargets(N, C, path=path))  # opened while another writes it, or after
    resumed, late = (ProgressiveKD(CachedTargets(N, C, path=path)) for _ in range(2))
    resumed.load_state_dict(first.state_dict())
    update(resumed)
    late.epoch.fill_(3)
    update(late)
    with pytest.warns(
        UserWarning, match=rf"^{str(path)!r} held rows already, and no checkpoint was loaded: in epoch 0"
    ):
        update(rank)
    update(rank)
    first.update(torch.randn(1, C), index=torch.tensor([1]))
    update(ProgressiveKD(CachedTargets(N, C, path=path)))  # of ranks that share a file one may come late


def header(**facts):
    return lambda content: json.dumps({**json.loads(content[:4080]), **facts}).encode().ljust(4080) + content[4080:]


HOLD = "hold the store that is asked for"
TARGETS = "be a file of targets (aikd-losses targets 3)"
BUILD, PASS = (
    "Build the store with the file's settings, pass another path, or delete it and load a checkpoint.",
    "is not. Pass another path.",
)
REFUSED = {  # what is done to a file, what is built, and what is said
    "samples": (bytes, {"num_samples": 11}, HOLD, f"has num_samples=10, not 11. {BUILD}"),
    "dtype": (bytes, {"dtype": torch.float32}, HOLD, f"has dtype='torch.float16', not 'torch.float32'. {BUILD}"),
    "two": (header(num_classes=3, by="me"), {}, HOLD, f"has num_classes=3, not 4, by='me', not None. {BUILD}"),
    "more": (header(by="someone"), {}, HOLD, f"has by='someone', not None. {BUILD}"),
    "short": (lambda x: x[:-1], {}, HOLD, f"has bytes=12287, not 12288. {BUILD}"),
    "long": (lambda x: x + b"\0", {}, HOLD, f"has bytes=12289, not 12288. {BUILD}"),
    "empty": (lambda x: b"", {}, TARGETS, PASS),
    "list": (lambda x: b"[1, 2]", {}, TARGETS, PASS),
    "brackets": (lambda x: b"[" * 4096, {}, TARGETS, PASS),
    "version": (header(format="aikd-losses targets 2"), {}, TARGETS, PASS),
}


@pytest.mark.parametrize(("change", "settings", "wanted", "found"), REFUSED.values(), ids=REFUSED)
def test_a_file_of_something_else_is_refused_and_left_as_it_is(change, settings, wanted, found, path):
    store = CachedTargets(N, C, path=path)
    store.write(torch.tensor([1]), rows(0))
    store.advance_epoch()
    before = change(path.read_bytes())
    path.write_bytes(before)
    with pytest.raises(ValueError, match="`path` must") as error:
        CachedTargets(**{"num_samples": N, "num_classes": C, "path": path, **settings})
    assert str(error.value) == f"`path` must {wanted}; {str(path)!r} {found}"
    assert path.read_bytes() == before


def test_a_file_of_impossible_classes_is_refused(path):
    store = CachedTargets(N, C, top_k=2, path=path)
    store.write(torch.tensor([1]), rows(0))
    store.classes[1] = C
    store.advance_epoch()
    with pytest.raises(ValueError, match=rf"^`classes` in the damaged `path` '{path}' must be in 0\.\.3\.$"):
        CachedTargets(N, C, top_k=2, path=path)


def test_who_comes_second_in_creating_a_file_opens_that_of_the_first(path, monkeypatch):
    def late(source, target):
        monkeypatch.undo()
        CachedTargets(N, C, path=path).write(torch.tensor([1]), rows(0))  # the first
        os.link(source, target)

    monkeypatch.setattr(os, "link", late)
    assert CachedTargets(N, C, path=path).known.nonzero().tolist() == [[1]]
    assert list(path.parent.iterdir()) == [path]


def test_processes_that_create_a_file_at_once_share_one(path):
    def open_and_write(i):
        barrier.wait()
        store = CachedTargets(N, C, path=path)
        store.write(torch.tensor([i]), rows(i))
        barrier.wait()
        store.advance_epoch()

    barrier = FORK.Barrier(4)
    workers = [FORK.Process(target=open_and_write, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert CachedTargets(N, C, path=path).known.tolist() == [True] * 4 + [False] * 6
    assert list(path.parent.iterdir()) == [path]


def test_ranks_tell_a_file_by_what_it_is_on_its_machine(path, monkeypatch):
    CachedTargets(N, C, path=path)
    link, other = path.with_name("link"), path.with_name("other")
    os.link(path, link)
    seen = []
    for machine in ("one", "two"):
        monkeypatch.setattr(_file, "MACHINE", machine)
        here, linked, there = (CachedTargets(N, C, path=p)._file.identity for p in (path, link, other))
        assert here == linked
        seen += [here, there]
    assert len(set(seen)) == 4
    torch.tensor(seen)  # int64, to be sent


# ------------------------------------------------------------------------------------------------------- interrupted


def killed(path, doing, reaped=True):
    """A process was killed after `doing` something to a store in a file; the system may still keep its number."""
    pid = os.fork()
    if pid == 0:
        doing(CachedTargets(N, C, path=path))
        os.kill(os.getpid(), signal.SIGKILL)
    found = os.waitid(os.P_PID, pid, os.WEXITED | (0 if reaped else os.WNOWAIT))
    assert found.si_status == signal.SIGKILL
    return pid


def in_the_second_epoch(store):
    store.write(torch.arange(N), rows(*range(N)))
    store.advance_epoch()
    store.write(torch.tensor([1]), rows(20))


@pytest.fixture(params=["reaped", "zombie", "orphan"])
def interrupted(request, path):
    """The file of a process that was killed in its second epoch, and maybe had a child that lives."""
    hears, says = os.pipe()

    def doing(store):
        in_the_second_epoch(store)
        if request.param == "orphan" and os.fork() == 0:
            os.write(says, str(os.getpid()).encode())
            time.sleep(60)

    pid = killed(path, doing, reaped=request.param != "zombie")
    yield path
    if request.param == "zombie":
        os.waitpid(pid, 0)
    if request.param == "orphan":
        os.kill(int(os.read(hears, 20)), signal.SIGKILL)


def assert_refused(store):
    """By all but loading, in the same words; nobody is trained either."""
    index, discriminator = torch.tensor([3]), MLPDiscriminator(C)
    adam = torch.optim.Adam(discriminator.parameters())
    adversarial = AdversarialDistributionLoss(discriminator, optimizer=adam)
    stack = LossStack({"progressive": ProgressiveKD(store), "adversarial": adversarial})
    given = dict(student_logits=rows(0), teacher_logits=rows(1), target=index, index=index)
    weights = copy.deepcopy(discriminator.state_dict())
    for call in (
        lambda: store.read(index),
        lambda: store.write(index, rows(0)),
        lambda: store.advance_epoch(),
        lambda: store.state_dict(),
        lambda: copy.deepcopy(store),
        lambda: stack(**given),
        lambda: stack.update(**given),
    ):
        with pytest.raises(RuntimeError) as error:
            call()
        assert str(error.value) == (
            f"`path` {store.path!r} was left half written by a process that ended before `advance_epoch`: rows may be torn. "
            "Load a checkpoint of the store (`load_state_dict`), or delete the file to start without history."
        )
    assert_same(discriminator.state_dict(), weights)


def test_a_file_whose_writer_was_killed_is_noticed_and_left_as_it_is_until_a_checkpoint_makes_it_whole(interrupted):
    before, kept = interrupted.read_bytes(), CachedTargets(N, C)
    kept.write(torch.arange(N), rows(*range(N)))
    first, second = CachedTargets(N, C, path=interrupted), CachedTargets(N, C, path=interrupted)
    for store in (first, second, pickle.loads(pickle.dumps(first))):
        assert_refused(store)
    assert interrupted.read_bytes() == before
    first.load_state_dict(kept.state_dict())
    for store in (first, second, CachedTargets(N, C, path=interrupted)):
        assert_same(contents(store), contents(kept))
        assert torch.equal(store.read(torch.arange(N))[0], kept.read(torch.arange(N))[0])
    killed(interrupted, in_the_second_epoch)
    assert_refused(CachedTargets(N, C, path=interrupted))  # once more


def test_a_file_that_was_being_loaded_is_noticed(path):
    state = CachedTargets(N, C).state_dict()

    def loading(store):
        store._file.end = lambda: os.kill(os.getpid(), signal.SIGKILL)
        store.load_state_dict(state)

    killed(path, loading)
    assert_refused(CachedTargets(N, C, path=path))


def test_others_that_have_a_file_open_do_not_hide_that_its_writer_was_killed(path):
    other = CachedTargets(N, C, path=path)

    def writing(store):
        in_the_second_epoch(store)
        other.advance_epoch()  # of another epoch than this one
        store.write(torch.tensor([2]), rows(21))

    killed(path, writing)
    other.write(torch.tensor([1]), rows(0))
    assert other.read(torch.arange(N))[1].all()
    assert_refused(CachedTargets(N, C, path=path))


def test_a_file_whose_writer_lives_was_not_interrupted_and_one_whose_writer_ended_was(path):
    def writing():
        store = CachedTargets(N, C, path=path)
        store.write(torch.tensor([1]), rows(0))
        written.set()
        end.wait(60)

    written, end = FORK.Event(), FORK.Event()
    worker = FORK.Process(target=writing)
    worker.start()
    assert written.wait(60)
    assert CachedTargets(N, C, path=path).read(torch.tensor([1]))[1].item()
    end.set()
    worker.join(60)
    assert worker.exitcode == 0
    assert_refused(CachedTargets(N, C, path=path))


def test_a_forked_process_leaves_the_epoch_to_its_parent(path):
    store = CachedTargets(N, C, path=path)
    store.write(torch.tensor([1]), rows(0))
    child = os.fork()
    if child == 0:
        store.write(torch.tensor([2]), rows(1))
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    for each in (store, CachedTargets(N, C, path=path)):
        assert each.read(torch.tensor([1, 2]))[1].all()


@pytest.fixture
def began(monkeypatch):
    """When processes began, all that the system knows of them: by number."""

    def stat(path):
        pid = int(path.split("/")[2])
        if pid not in when:
            raise FileNotFoundError
        return f"{pid} (my (odd) name) S {' '.join('0' * 18)} {when[pid]} 0 0".encode()

    when = {}
    monkeypatch.setattr(_file, "Path", lambda path: SimpleNamespace(read_bytes=lambda: stat(path)))
    return when


def test_a_file_is_interrupted_unless_its_writer_is_known_to_live_here(path, began, monkeypatch):
    CachedTargets(N, C, path=path).write(torch.tensor([1]), rows(0))
    began[7] = 123
    content = path.read_bytes()
    path.write_bytes(content[:4080] + struct.pack("2q", *_file._process(7)) + content[4096:])
    assert CachedTargets(N, C, path=path).read(torch.tensor([1]))[1].item()
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(_file, "MACHINE", "another")
        assert_refused(CachedTargets(N, C, path=path))
    began[7] = 124  # another process has its number by now
    assert_refused(CachedTargets(N, C, path=path))


@pytest.mark.usefixtures("began")
def test_where_processes_cannot_be_told_only_ones_own_lives(path, monkeypatch):
    CachedTargets(N, C, path=path).write(torch.tensor([1]), rows(0))
    assert CachedTargets(N, C, path=path).read(torch.tensor([1]))[1].item()
    monkeypatch.setattr(os, "getpid", os.getppid)
    assert_refused(CachedTargets(N, C, path=path))


# ---------------------------------------------------------------------------------------------------- state and copies


def test_the_state_is_saved_without_a_copy_and_loaded_from_weights_only_and_from_safetensors(build, place, tmp_path):
    store = build(**place)
    store.write(torch.tensor([1, 7]), rows(0, 1))
    assert all(x.data_ptr() == getattr(store, name).data_ptr() for name, x in store.state_dict().items())
    for saved in (store, copy.deepcopy(store)):
        torch.save(saved.state_dict(), tmp_path / "a.pt")
        assert (tmp_path / "a.pt").stat().st_size < 10_000  # no column drags the whole file along
        save_file(saved.state_dict(), tmp_path / "a.safetensors")
        for state in (torch.load(tmp_path / "a.pt", weights_only=True), load_file(tmp_path / "a.safetensors")):
            fresh = build()
            fresh.load_state_dict(state)
            assert_same(contents(fresh), contents(store))


WRONG_ROWS = r"`rows` in the checkpoint must be distributions \(no negative"
MISFITS = {  # the settings of what was saved, what was done to its state, and what is said
    "samples": ({"num_samples": N + 1}, None, r"`rows` in the checkpoint is .* of shape \(11, 4\); here it is"),
    "classes": ({"num_classes": C + 1}, None, r"`rows` in the checkpoint is .* of shape \(10, 5\); here it is"),
    "dtype": ({"dtype": torch.float32}, None, r"`rows` in the checkpoint is torch\.float32 of shape"),
    "more": ({"top_k": C}, None, "`classes` in the checkpoint is torch.uint8 of shape .*; here it is NoneType. Build"),
    "less": ({}, None, r"Missing key\(s\) in state_dict: \"classes\""),
    "class": ({"top_k": C}, ("classes", 2, C), r"`classes` in the checkpoint must be in 0\.\.3"),
    "byte": ({"top_k": C}, ("classes", 2, 255), r"`classes` in the checkpoint must be in 0\.\.3"),
    "nan": ({}, ("rows", 2, torch.nan), WRONG_ROWS),
    "infinite": ({}, ("rows", 2, torch.inf), WRONG_ROWS),
    "negative": ({}, ("rows", 2, torch.tensor([1.25, -0.25, 0, 0])), WRONG_ROWS),
    "large": ({}, ("rows", 2, 0.5), WRONG_ROWS),
    "known": ({}, ("known", 0, True), WRONG_ROWS),
}


@pytest.mark.parametrize("what", MISFITS)
def test_a_checkpoint_that_does_not_fit_is_refused_and_nothing_is_loaded(what, place):
    settings, change, message = MISFITS[what]
    store = CachedTargets(N, C, top_k=C if what in ("less", "class", "byte") else None, **place)
    store.write(torch.tensor([1]), rows(0))
    other = CachedTargets(**{"num_samples": N, "num_classes": C, **settings})
    other.write(torch.tensor([2, 3]), torch.full((2, other.num_classes), 1 / other.num_classes))
    state, before = other.state_dict(), contents(store)
    if change is not None:
        state[change[0]][change[1]] = change[2]
    with pytest.raises(RuntimeError, match=message):
        store.load_state_dict(state)
    assert_same(contents(store), before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_what_a_store_holds_it_loads_again(dtype):
    """Also rows that are far from sum 1: flat ones of many classes, their few largest, averages that rounding keeps away."""
    flat, one = torch.full((1, 5000), 1 / 5000), torch.eye(5000)[:1]
    for store in (
        CachedTargets(2, 5000, dtype=dtype),
        CachedTargets(2, 5000, dtype=dtype, top_k=1),
        EMATargets(2, 5000, decay=0.999, dtype=dtype),
    ):
        for probs in [flat, *[one] * 200]:
            store.write(torch.tensor([0]), probs)
            copy.deepcopy(store).load_state_dict(store.state_dict())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_a_deep_copy_is_independent_and_a_pickle_holds_the_rows_or_refers_to_the_file(copied, build, place):
    store = build(**place)
    store.write(torch.tensor([1]), rows(0))
    before, clone = contents(store), copied(store)
    assert_same(contents(clone), before)
    clone.write(torch.tensor([1, 2]), rows(3, 4))
    one_file = bool(place) and copied is not copy.deepcopy
    assert (clone.path is not None) == one_file
    assert_same(contents(store), contents(clone) if one_file else before)


def test_what_shares_a_store_or_its_rows_shares_their_copies():
    store = CachedTargets(N, C)
    first, second, table = copy.deepcopy([store, ProgressiveKD(store), store.rows])
    assert first is second.targets
    assert first is not store
    assert table is first.rows


def test_a_pickle_of_a_store_whose_file_is_gone_makes_no_new_one(path):
    pickled = pickle.dumps(CachedTargets(N, C, path=path))
    path.unlink()
    with pytest.raises(FileNotFoundError) as error:
        pickle.loads(pickled)
    assert error.value.filename == str(path)
    assert not path.exists()


def test_a_store_follows_to_in_device_alone_and_into_shared_memory_unless_its_place_was_given(path):
    free, *given = CachedTargets(N, C), CachedTargets(N, C, device="cpu"), CachedTargets(N, C, path=path)
    for store in (free, *given):
        assert not store.double().rows.is_shared()
        assert store.share_memory().rows.is_shared() == (store is free)
        store.to("meta")
        store.double()
        assert store.rows.dtype == torch.float16
        assert {x.is_meta for x in (store.rows, store.known, store._last_write)} == {store is free}


def test_a_store_without_memory_becomes_an_empty_one_and_loses_no_checkpoint():
    with torch.device("meta"):
        store = CachedTargets(N, C)
    assert store.rows.is_meta
    full = CachedTargets(N, C)
    full.write(torch.arange(N), torch.full((N, C), 1 / C))
    for assign in (False, True):
        with pytest.raises(RuntimeError, match=r"`rows` in the checkpoint is .* here it is .* without values \(meta\)"):
            store.load_state_dict(full.state_dict(), assign=assign)
    store.to_empty(device="cpu")
    assert not store.read(torch.arange(N))[1].any()
    store.load_state_dict(full.state_dict())
    assert store.known.all()


# ------------------------------------------------------------------------------------------------------ through a loss


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_row_with_nan_or_inf_is_not_written_and_spoils_no_other(build, bad):
    spoilt, clean = ProgressiveKD(build()), ProgressiveKD(build())
    logits, index = torch.randn(4, C), torch.tensor([0, 3, 3, 5])
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
    assert_close(probs, torch.tensor([[1, 1, 0, 1]]) / 3, rtol=1e-3, atol=0)


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


def test_a_store_of_the_users_own_gets_flat_ids_without_masked_and_spoilt_rows():
    loss = ProgressiveKD(Recording(), alpha=0.5, class_dim=-1)
    logits, index = torch.randn(2, 3, C), torch.tensor([[4, 1, -100], [7, 4, 8]])
    logits[1, 2], mask = torch.nan, index >= 0
    loss.update(logits, index=index, mask=mask)
    ((ids, probs),) = loss.targets.writes
    assert ids.tolist() == [4, 1, 7, 4]
    assert_close(probs, logits.softmax(-1).flatten(0, 1)[[0, 1, 3, 4]])
    value = loss(logits[:1], torch.zeros(1, 3, dtype=torch.int64), index=index[:1], mask=mask[:1])
    assert loss.targets.reads[0].tolist() == [4, 1, 0]  # whatever stands at a masked position, which may be no id
    soft = torch.cat([0.5 * torch.eye(C)[:1] + 0.5 / C] * 2)
    assert_close(value, -(soft * logits[0, :2].log_softmax(-1)).sum(-1).mean())
    loss.advance_epoch()
    assert loss.targets.advances == 1


def test_a_row_is_alone_by_default_and_partners_that_a_mask_hides_may_be_no_ids():
    loss = ProgressiveKD(CachedTargets(N, C), alpha=1.0)
    loss.targets.write(torch.arange(N), rows(*range(N)))
    s, mask = torch.randn(3, C), torch.tensor([True, False, True])
    ids = {"index": torch.tensor([1, 2, 3]), "partner_index": torch.tensor([4, 5, 6])}
    assert_close(loss(s, **ids), loss(s, index=ids["index"]))
    hidden, kept = (
        {name: f(x) for name, x in ids.items()} for f in (lambda x: x.masked_fill(~mask, N), lambda x: x[mask])
    )
    assert_close(loss(s, **hidden, mask=mask, mix_lambda=0.3), loss(s[mask], **kept, mix_lambda=0.3))
