"""The store of trainings: whole steps, other tenants out of reach, and a full disk."""

from __future__ import annotations

import errno
import json
import resource
import subprocess
import sys
import textwrap

import pytest
import torch

from fedsea.errors import CheckpointError, ConfigError
from fedsea.model.adapters import read_adapter
from fedsea.model.checkpoint import Checkpoint
from fedsea.model.lora import LoraConfig
from fedsea.model.optimization import AdamWConfig
from fedsea.model.partition import Span
from fedsea.model.spans import Placement, load_trunk
from fedsea.server.training_run import Recipe, TrainingRun
from fedsea.server.training_store import GROUPS, RunKey, TrainingStore, check_name
from fedsea.wire.messages import Step

KEY = RunKey("acme", "notes")
RECIPE = Recipe(
    model="f00d",
    span=Span(1, 3),
    lora=LoraConfig(rank=2, targets=("q_proj",), freeze_a=True),
    prompt_rows=2,
    optimizer=AdamWConfig(),
    seed=1,
)


@pytest.fixture
def make_run(checkpoint_folder):
    """Fresh runs of the tiny model."""
    blocks = load_trunk(Checkpoint.open(checkpoint_folder), Span(0, 4), Placement())

    def make(recipe=RECIPE):
        return TrainingRun.fresh(recipe, blocks.linears(), 32, 1.0, Placement())

    return make


@pytest.fixture
def store(tmp_path):
    """A store that is open."""
    opened = TrainingStore(tmp_path / "store", 2, "tiny", 1.0)
    opened.open()
    yield opened
    opened.close()


def stepped(run, count):
    """The run some steps later, with other values."""
    for _ in range(count):
        for parameter in (*run.adapter.parameters(), run.prompt.rows):
            if parameter.requires_grad:
                parameter.grad = torch.full_like(parameter, 0.5)
        run.step(Step(run.steps + 1, 0.1))
    return run


def test_a_step_comes_back_whole(store, make_run):
    """Factors, prompt, moments, the last answer and the members' counts."""
    run = stepped(make_run(), 3)
    assert store.save(KEY, run, {"acme": 3, "globex": 1}) == ""
    again = make_run()
    store.load(KEY, 3, again)
    assert (again.steps, again.last) == (3, run.last)
    assert again.prompt_drawn
    assert store.members(KEY, 3) == {"acme": 3, "globex": 1}
    for one, other in zip(run.adapter.parameters(), again.adapter.parameters(), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(run.prompt.rows, again.prompt.rows)
    for name, tensor in run.optimizer.state().items():
        assert torch.equal(tensor, again.optimizer.state()[name])


def test_only_the_last_steps_stay(store, make_run):
    """As many as the operator said; what is served is the last."""
    run = make_run()
    for _ in range(4):
        store.save(KEY, stepped(run, 1), {})
    assert store.steps(KEY) == [3, 4]
    found = store.trained(KEY, Span(0, 4))
    assert found is not None
    assert found[0].step == 4
    assert store.trained(RunKey("acme", "other"), Span(0, 4)) is None


def test_a_failed_first_save_leaves_no_name(store, make_run, monkeypatch):
    """A tenant's trainings are those with something saved, however often a disk was full."""
    run = stepped(make_run(), 1)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("fedsea.server.training_store.write_adapter", full)
        assert "No space left" in store.save(KEY, run, {})
    assert store.names("acme") == set()
    assert store.save(KEY, run, {}) == ""
    assert store.names("acme") == {"notes"}


def test_a_save_that_is_replaced_while_it_is_read(store, make_run, monkeypatch):
    """Then the next one is read; the first may be gone, or be half of each."""
    run = make_run()
    store.save(KEY, stepped(run, 1), {})

    def replacing(folder, span):
        if run.steps == 1:
            store.save(KEY, stepped(run, 2), {})  # step 3
            store.save(KEY, stepped(run, 1), {})  # step 4: the first is removed
        return read_adapter(folder, span)

    monkeypatch.setattr("fedsea.server.training_store.read_adapter", replacing)
    version, _ = store.trained(KEY, Span(0, 4))
    assert version.step == 4


def test_the_adapter_is_in_pefts_format(store, make_run, tmp_path):
    """A step's folder is read like any adapter."""
    run = stepped(make_run(), 1)
    store.save(KEY, run, {})
    folder = tmp_path / "store" / "acme" / "notes" / "step-00000001"
    assert len(read_adapter(folder, Span(0, 4)).factors) == 2
    about = json.loads((folder / "training.json").read_text())
    assert about["recipe"]["lora"]["freeze_a"] is True


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", ".x", "a/b", "a\\b", "a b", "é", "a" * 101, "step-1", "+groups", "a\x00"],
)
def test_names_that_are_no_names(name):
    """Nothing that leads elsewhere becomes part of a path."""
    with pytest.raises(ConfigError, match="cannot have this name"):
        check_name(name)


@pytest.mark.parametrize("name", ["a", "notes-2", "v1.0_b", "A" * 100, "steps", "step-"])
def test_names_that_are(name):
    """Letters, digits, dots, lines."""
    assert check_name(name) == name


def test_groups_and_tenants_do_not_meet():
    """No tenant's folder is that of the groups."""
    assert RunKey(GROUPS, "ward").path != RunKey("groups", "ward").path
    with pytest.raises(ConfigError):
        check_name(GROUPS)


@pytest.mark.parametrize(
    "damage", ["training.json", "optimizer.safetensors", "prompt", "format", "kind"]
)
def test_a_damaged_step_is_an_error_without_paths(store, make_run, tmp_path, damage):
    """The client is told what to do, and nothing of the server's folders."""
    run = stepped(make_run(), 1)
    store.save(KEY, run, {})
    folder = tmp_path / "store" / "acme" / "notes" / "step-00000001"
    if damage == "format":
        (folder / "training.json").write_text('{"format": 2}')
    elif damage == "kind":
        (folder / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    elif damage == "prompt":
        (folder / "prompt" / "adapter_config.json").unlink()
    else:
        (folder / damage).write_bytes(b"\x00")
    with pytest.raises(CheckpointError, match="cannot be read at the server") as caught:
        store.load(KEY, 1, make_run())
    assert str(tmp_path) not in str(caught.value)


def test_a_store_that_cannot_be_made(tmp_path):
    """A file in the way is the operator's error, named with its path."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"file.*cannot be used"):
        TrainingStore(tmp_path / "file" / "store", 2, "tiny", 1.0).open()


FULL = textwrap.dedent(
    """
    import resource, sys
    from pathlib import Path
    from fedsea.model.checkpoint import Checkpoint
    from fedsea.model.lora import LoraConfig
    from fedsea.model.optimization import AdamWConfig
    from fedsea.model.partition import Span
    from fedsea.model.spans import Placement, load_trunk
    from fedsea.server.training_run import Recipe, TrainingRun
    from fedsea.server.training_store import RunKey, TrainingStore
    from fedsea.wire.messages import Step
    import signal

    model, folder = sys.argv[1:]
    blocks = load_trunk(Checkpoint.open(model), Span(0, 4), Placement())
    lora = LoraConfig(rank=16, targets=("q_proj", "down_proj"))
    recipe = Recipe(
        model="f", span=Span(0, 4), lora=lora, prompt_rows=0, optimizer=AdamWConfig(), seed=1
    )
    run = TrainingRun.fresh(recipe, blocks.linears(), 32, 1.0, Placement())
    store = TrainingStore(Path(folder), 2, "tiny", 1.0)
    store.open()
    key = RunKey("acme", "notes")
    run.step(Step(1, 0.1))
    print(repr(store.save(key, run, {})))
    run.step(Step(2, 0.1))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    free = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, free[1]))
    print(store.save(key, run, {}))
    print(store.steps(key))
    resource.setrlimit(resource.RLIMIT_FSIZE, free)
    print(repr(store.save(key, run, {})))
    print(store.steps(key))
    """
)


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="no limit on files here")
def test_a_full_disk_leaves_the_earlier_step(checkpoint_folder, tmp_path):
    """A save that finds no room says so, keeps what was saved, and works when there is room."""
    script = tmp_path / "full.py"
    script.write_text(FULL)
    done = subprocess.run(
        [sys.executable, str(script), str(checkpoint_folder), str(tmp_path / "store")],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    lines = done.stdout.splitlines()
    assert lines[0] == "''", done.stderr
    assert lines[1].startswith("the server could not save step 2 (File too large); earlier saves")
    assert str(tmp_path) not in lines[1]
    assert lines[2:] == ["[1]", "''", "[1, 2]"]
    assert not list((tmp_path / "store").rglob(".tmp*"))
