"""`layerwatch run`: the script runs as Python runs it, and its training is in a run."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from layerwatch import Run

Done = subprocess.CompletedProcess[str]

TRAINING = """
import sys, torch
from torch import nn
torch.manual_seed(0)
class Net(nn.Sequential): pass
net = Net(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
optimizer = torch.optim.Adam(net.parameters(), 0.01)
generator = torch.Generator().manual_seed(1)
for step in range(int(sys.argv[1])):
    x = torch.randn(16, 6, generator=generator)
    loss = nn.functional.cross_entropy(net(x), x[:, :3].argmax(1))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
print("loss", loss.item(), torch.initial_seed(), torch.rand(1).item())
"""


@pytest.fixture
def python(tmp_path: Path, checkout: Path) -> Callable[..., Done]:
    """Runs a program in the test's folder; what is given to Python follows `layerwatch run`, if wanted."""

    def call(*arguments: str, under: tuple[str, ...] | None = None, **how: Any) -> Done:
        before = [] if under is None else ["-m", "layerwatch", "run", *under]
        return subprocess.run(
            [sys.executable, *before, *arguments], cwd=tmp_path, text=True, capture_output=True, check=False,
            env={**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}, **how,
        )  # fmt: skip

    return call


def write(path: Path, code: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(code))


def alike(plain: Done, watched: Done) -> str:
    """They did the same; what layerwatch has said."""
    assert watched.stdout == plain.stdout
    assert watched.returncode == plain.returncode
    lines = watched.stderr.splitlines(keepends=True)
    own = [line for line in lines if line.startswith("layerwatch: ")]
    assert "".join(line for line in lines if line not in own) == plain.stderr
    return "".join(own)


PROBE = '''
"""Says what it sees of itself."""
import pickle, sys
def function(): pass
answer: int = 42
own = {name: value for name, value in vars().items() if name not in ("__loader__", "__spec__")}
print(__name__, sorted(own), __doc__, __file__, __package__, __cached__, __annotations__)
print(type(__loader__).__name__, __loader__.name, __spec__ and __spec__.name, __builtins__.__name__)
print(sys.argv, sys.path, sys.modules["__main__"].answer, sys.flags.optimize)
print(pickle.dumps(function), [m.__class__.__name__ for m in sys.meta_path[-3:]])
print(sys.stdin.read())
'''


@pytest.mark.parametrize(
    "arguments",
    [
        ("folder/probe.py", "--run", "x", "-m", "b", "--", "--help"),
        ("-m", "folder.probe", "--every", "3", "a b"),
        ("-m", "folder", "-h"),
        ("folder", "--run"),
    ],
    ids=["script", "module", "package", "directory"],
)
def test_a_program_sees_itself_as_under_python(
    tmp_path: Path, python: Callable[..., Done], arguments: tuple[str, ...]
) -> None:
    write(tmp_path / "folder" / "probe.py", PROBE)
    write(tmp_path / "folder" / "__main__.py", PROBE)
    plain = python(*arguments, input="what is typed")
    watched = python(*arguments, input="what is typed", under=("--run", "run"))
    assert "what is typed" in plain.stdout, plain.stderr
    assert "torch was not imported" in alike(plain, watched)
    assert not (tmp_path / "run").exists()


ENDINGS = {
    "exit code": "import sys; sys.exit(7)",
    "exit with words": "raise SystemExit('no data')",
    "exception": "def f(x):\n    return 1 / x\ntry:\n    f(0)\nexcept ZeroDivisionError:\n    f(0.0)",
    "wrong value": "raise ValueError('the script says so')",
    "no module": "import no_such_module",
    "syntax": "x = (1,\ny = 2",
    "torch, from another": "import torch\ntry:\n    torch.zeros(2).backward()\nexcept RuntimeError as e:\n"
    "    raise OSError('x') from e",
    "optimizer": "import torch\ntorch.optim.SGD([], 0.1)",
    "own excepthook": "import sys, traceback\n"
    "sys.excepthook = lambda *e: print(*traceback.format_exception(*e))\n1 / 0",
    "interrupted": "raise KeyboardInterrupt",
    "killed": "import os, signal\nos.kill(os.getpid(), signal.SIGTERM)",
    "left in a hurry": "import os\nos._exit(5)",
}


@pytest.mark.parametrize("how", ENDINGS)
def test_it_ends_as_under_python(tmp_path: Path, python: Callable[..., Done], how: str) -> None:
    write(tmp_path / "script.py", ENDINGS[how])
    plain = python("script.py")
    assert (plain.returncode, how) != (0, how)
    own = alike(plain, python("script.py", under=()))
    assert len(own.splitlines()) == (0 if how in ("killed", "left in a hurry") else 1)


def test_a_script_that_is_not_there(python: Callable[..., Done]) -> None:
    alike(python("gone.py"), python("gone.py", under=()))
    alike(python("-m", "gone"), python("-m", "gone", under=()))


def test_a_training_is_watched_and_is_the_same(tmp_path: Path, python: Callable[..., Done]) -> None:
    write(tmp_path / "train.py", TRAINING)
    options = ("--run", "runs/a", "--every", "2", "--exclude", "bias", "--no-activations", "--step-norms")
    options += ("--tag", "sweep", "--tag", "base", "--owner", "ana", "--note", "a b", "--no-system")
    words = alike(python("train.py", "7"), python("train.py", "7", under=options))
    assert words == "layerwatch: watching Net (2 tensors) in runs/a\n"
    run = Run(tmp_path / "runs" / "a")
    assert run.last_step == 6
    assert run.info["model"] == ["Net"]
    assert run.info["command"] == ["train.py", "7"]
    assert list(run.tensors()["tensor"]) == ["0.weight", "2.weight"]
    assert sorted(set(run.stats("gradient")["step"])) == [0, 2, 4, 6]
    assert len(run.scalars("train_loss")) == 7
    assert set(run.stats("gradient_norm")["step"]) == {1, 3, 5}
    assert run.info["closed"]
    assert [run.info[key] for key in ("tags", "owner", "note")] == [["sweep", "base"], "ana", "a b"]
    again = python("train.py", "7", under=options)
    assert (again.returncode, again.stdout) == (2, "")
    assert "exists already" in again.stderr


def test_signals_reach_the_script(tmp_path: Path, checkout: Path) -> None:
    write(
        tmp_path / "script.py",
        TRAINING.replace("optimizer.step()", "optimizer.step(); print(step, flush=True)")
        .replace("for step", "import time\ntry:\n  for step")
        .replace("\n    ", "\n      ")
        .replace('print("loss"', 'except KeyboardInterrupt:\n  time.sleep(0.1)\n  sys.exit(9)\nprint("loss"'),
    )
    command = [sys.executable, "-m", "layerwatch", "run", "--run", "run", "script.py", "1000000"]
    # Shells let what they start in the background ignore interrupts, and children inherit that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"},
    ) as process:  # fmt: skip
        signal.signal(signal.SIGINT, before)
        assert process.stdout is not None
        while process.stdout.readline() != "3\n":
            assert process.poll() is None
        for _ in range(5):  # Python drops an interrupt that comes in a destructor: one presses the keys again
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=20)
                break
        assert process.returncode == 9
    assert Run(tmp_path / "run").info["closed"]


SPAWNING = """
import multiprocessing, sys, time, torch
def work():
    net = torch.nn.Linear(4, 4)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    net(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    while time.process_time() < 1.5:
        pass
    print(__name__, sys.argv, flush=True)
if __name__ == "__main__":
    worker = multiprocessing.get_context(sys.argv[1]).Process(target=work)
    worker.start()
    worker.join()
    print(worker.exitcode)
"""


def test_workers_are_not_seen_and_it_says_so(tmp_path: Path, python: Callable[..., Done]) -> None:
    write(tmp_path / "script.py", SPAWNING)
    done = python("script.py", "spawn", under=("--run", "run"))
    assert (done.returncode, done.stdout) == (0, "__mp_main__ ['script.py', 'spawn']\n0\n")
    words = done.stderr
    assert len(words.splitlines()) == 1
    assert "child processes worked for" in words
    assert "call layerwatch.watch in the function that they run" in words
    assert not (tmp_path / "run").exists()


def test_a_script_that_watches_is_not_watched_twice(tmp_path: Path, python: Callable[..., Done]) -> None:
    code = TRAINING.replace(
        "for step", "import layerwatch\nw = layerwatch.watch(net, run='own')\nfor step", 1
    )
    write(tmp_path / "train.py", code)
    done = python("train.py", "3", under=("--run", "auto"))
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines() == ["layerwatch: the script calls watch itself: nothing was added"]
    assert Run(tmp_path / "own").last_step == 2
    assert not (tmp_path / "auto").exists()


PARALLEL = """
import os, sys, torch
from torch import nn
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
dist.init_process_group("gloo")
torch.manual_seed(0)
net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
model = DistributedDataParallel(net)
optimizer = torch.optim.SGD(model.parameters(), 0.1)
for step in range(4):
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(10 * step + dist.get_rank()))
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()
    if dist.get_rank() == 0:
        print(repr(net[0].weight.grad.double().norm().item()))
dist.destroy_process_group()
"""


def test_under_torchrun(tmp_path: Path, python: Callable[..., Done]) -> None:
    write(tmp_path / "train.py", PARALLEL)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    options = ("--out", "run", "--every", "1", "--tag", "pair", "--owner", "ana", "--note", "two ranks")
    done = python(*launcher, "-m", "layerwatch", "run", *options, "train.py")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("layerwatch: watching") == 1
    run = Run(tmp_path / "run")
    assert [run.info[key] for key in ("tags", "owner", "note")] == [["pair"], "ana", "two ranks"]
    gradients = run.stats("gradient", "0.weight")  # the averaged one
    assert gradients["norm"].tolist() == pytest.approx([float(x) for x in done.stdout.split()], rel=1e-6)
    assert gradients["step"].tolist() == [0, 1, 2, 3]
