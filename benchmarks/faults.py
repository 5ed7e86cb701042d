"""Kills, signals and failing disks at random instants: what was cut off must go on to the very same end.

    python benchmarks/faults.py                        # 50 kills of training, 50 of harvesting, 20 of each signal
    python benchmarks/faults.py --count 10 --json faults.json

Every case runs the command that a user types, in a process of its own, on tiny models and without downloads. ``--json`` writes
how many were tried and how many ended bit for bit as an undisturbed run: ``{"train": {"tried": 50, "equal": 50}, ...}``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

STEPS, HOOK = 200, "blocks.1.hook_resid_post"
QUICK = [
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.accelerator=cpu",
]
TRAINING = [*QUICK, "--num_threads=1", "--trainer.log_every_n_steps=20", f"--trainer.max_steps={STEPS}",
            "--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint",
            "--trainer.callbacks.every_n_train_steps=10"]  # fmt: skip
SPIKED = {"class_path": "aen_lightning.data.SpikedDataModule", "init_args": {
    "d_in": 32, "n_features": 64, "k": 4, "rho": 0.0, "train_batch_size_tokens": 128, "n_eval_samples": 256}}  # fmt: skip
SAE = {"architecture": "aen", "d_in": 32, "d_sae": 64, "lambda_1": 5e-3, "lambda_2": 1e-4, "ema_decay": 0.99,
       "warmup_delay_steps": 60, "warmup_ramp_steps": 30}  # fmt: skip


class Process:
    """A command in a fork of this process, which has imported everything already, or (``fresh``) in a new interpreter."""

    def __init__(
        self, words: list[str], log: Path, *, fresh: bool = False, env: dict[str, str] | None = None,
        prepare: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        self.log = log
        self._opened = None
        if fresh:
            clean = {
                k: v for k, v in os.environ.items() if k not in ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE")
            }
            with log.open("w") as file:
                self._opened = subprocess.Popen(
                    [sys.executable, "-m", "aen_lightning", *words], stdout=file, stderr=file, cwd=ROOT,
                    start_new_session=True, env=clean | {"PYTHONPATH": str(ROOT)} | (env or {}),
                )  # fmt: skip
            self.pid = self._opened.pid
            return
        self.pid = os.fork()
        if self.pid == 0:
            self._child(words, env or {}, prepare)

    def _child(self, words: list[str], env: dict[str, str], prepare: Callable[[], None]) -> None:
        code = 1
        try:
            os.setsid()
            with self.log.open("w") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            os.environ.update(env)
            tempfile.tempdir = None
            sys.argv = ["aen", *words]
            prepare()
            from aen_lightning.cli.main import main

            code = main(words)
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
        except BaseException as error:  # noqa: BLE001  # it ends up in the log
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def wait(self, seconds: float = 400) -> int:
        """Its exit code, negative for the signal that killed it."""
        deadline = time.monotonic() + seconds
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                self.kill()
                raise TimeoutError(f"it hung: {self.log.read_text()[-1500:]}")
            time.sleep(0.02)
        return code

    def poll(self) -> int | None:
        """Its exit code, or None while it runs."""
        if self._opened is not None:
            return self._opened.poll()
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        return os.waitstatus_to_exitcode(status) if pid else None

    def kill(self) -> None:
        """SIGKILL to it and to what it has started."""
        os.killpg(self.pid, signal.SIGKILL)


class Case:
    """A command of training or harvesting, and what it must leave."""

    def __init__(self, name: str, words: list[str], *, harvests: bool = False, ranks: int = 1) -> None:
        self.name, self.words, self.harvests, self.ranks = name, words, harvests, ranks

    def start(self, folder: Path, *more: str, **options: object) -> Process:
        """Start it in ``folder``, on from what is there."""
        folder.mkdir(exist_ok=True)
        where = [f"--trainer.default_root_dir={folder}"]
        where += [f"--shards.path={folder / 'set'}"] if self.harvests else ["--resume=auto"]
        return Process([*self.words, *where, *more], folder / "log", fresh=self.ranks > 1, **options)  # type: ignore[arg-type]

    def finish(self, folder: Path) -> str:
        """Run it to its end; the digest of what it leaves."""
        process = self.start(folder)
        if code := process.wait():
            return f"exit code {code}: {process.log.read_text()[-800:]}"
        return self.digest(folder)

    def digest(self, folder: Path) -> str:
        """Of the final weights of the newest run, or of the shards."""
        if self.harvests:
            root = folder / "set"
        else:
            root = (
                max(folder.glob("version_*"), key=lambda p: int(p.name.partition("_")[2])) / "sae" / "final"
            )
        digest = hashlib.sha256()
        for file in sorted(root.rglob("*.safetensors")):
            digest.update(file.relative_to(root).as_posix().encode() + file.read_bytes())
        return digest.hexdigest()

    def at_work(self, folder: Path) -> bool:
        """Whether it trains, or writes shards."""
        if self.harvests:
            return any((folder / "set").glob("*shard-*"))
        return any(folder.glob("version_*/checkpoints/*.ckpt"))


def make_cases(work: Path) -> list[Case]:
    """The cases, with the tiny model, text, shards and dictionary that they need."""
    from tests.support.tiny_models import save_tiny_model

    model, text = save_tiny_model("llama", work / "model"), work / "text.jsonl"
    generator = random.Random(0)
    documents = [
        " ".join(f"w{generator.randint(4, 63)}" for _ in range(generator.randint(5, 40))) for _ in range(1500)
    ]
    text.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    harvest = ["harvest", *QUICK, f"--model.model_name={model}", f"--model.hook_names=[{HOOK}]",
               f"--data.dataset_path={text}", "--data.context_size=16", "--data.batch_size_prompts=4",
               "--shards.shard_size_mib=0.05"]  # fmt: skip
    cases = [Case("harvest", harvest, harvests=True)]
    if (code := cases[0].start(work / "shards").wait()) != 0:
        raise RuntimeError(f"the harvest failed with {code}: {(work / 'shards' / 'log').read_text()[-1500:]}")
    d_in = json.loads((work / "shards" / "set" / "manifest.json").read_text())["d_in"][HOOK]

    def fit(name: str, data: dict[str, object], *more: str, command: str = "fit", **sae: object) -> Case:
        words = [
            command,
            *TRAINING,
            "--model.sae=" + json.dumps(SAE | sae),
            "--data=" + json.dumps(data),
            *more,
        ]
        return Case(name, words)

    shards = {"class_path": "aen_lightning.data.ActivationsDataModule", "init_args": {
        "path": str(work / "shards" / "set"), "train_batch_size_tokens": 128, "held_out_fraction": 0.05}}  # fmt: skip
    live = {"class_path": "aen_lightning.data.TextActivationsDataModule", "init_args": {
        "model_name": model, "hook_name": HOOK, "dataset_path": str(text), "context_size": 16,
        "train_batch_size_tokens": 64, "store_batch_size_prompts": 16, "held_out_documents": 40}}  # fmt: skip
    spiked = fit("spiked", SPIKED)
    if (code := spiked.start(work / "trained").wait()) != 0:
        raise RuntimeError(f"training failed with {code}: {(work / 'trained' / 'log').read_text()[-1500:]}")
    dictionary = work / "trained" / "version_0" / "sae" / "final"
    refit = Case(
        "refit", ["refit", *TRAINING, f"--model.dictionary={dictionary}", "--data=" + json.dumps(SPIKED)]
    )
    two = fit("two processes", SPIKED, "--trainer.devices=2", "--trainer.strategy=ddp")
    two.ranks = 2
    return [
        *cases,
        spiked,
        fit("shards", shards, d_in=d_in),
        fit("live text", live, d_in=d_in),
        fit("sweep", SPIKED, "--model.seed=[0,1]", command="sweep"),
        fit("accumulation", SPIKED, "--trainer.accumulate_grad_batches=3"),
        fit("starvation guard", SPIKED, starvation_guard=0.8),
        Case(
            "topk",
            [
                "fit",
                *TRAINING,
                "--data=" + json.dumps(SPIKED),
                "--model.sae=" + json.dumps({"architecture": "topk", "d_in": 32, "d_sae": 64, "k": 4}),
            ],
        ),
        refit,
        two,
    ]


class Faults:
    """Tries cases and counts.

    Args:
        work: Where all folders go.
        cases: What is disturbed.
        seed: Of the instants.
    """

    def __init__(self, work: Path, cases: list[Case], seed: int) -> None:
        self.work, self.cases, self.random = work, cases, random.Random(seed)
        self.expected: dict[str, tuple[str, float]] = {}
        self.counts: dict[str, dict[str, int]] = {}
        self.number = 0

    def undisturbed(self, case: Case) -> tuple[str, float]:
        """What a case leaves, and how long it works."""
        if case.name not in self.expected:
            folder = self.work / f"whole {case.name}"
            process, began = case.start(folder), None
            while process.poll() is None:
                began = began or (time.monotonic() if case.at_work(folder) else None)
                time.sleep(0.01)
            self.expected[case.name] = case.digest(folder), time.monotonic() - (began or time.monotonic())
        return self.expected[case.name]

    def disturbed(self, kind: str, case: Case, disturb: Callable[[Process], str | None]) -> None:
        """Start a case, disturb it at a random instant of its work (one in five before that), finish it, compare."""
        expected, seconds = self.undisturbed(case)
        self.number += 1
        folder = self.work / f"{self.number} {case.name}"
        process = case.start(folder)
        early = self.random.random() < 0.2
        while process.poll() is None and not early and not case.at_work(folder):
            time.sleep(0.005)
        time.sleep(self.random.random() * (2.0 if early else 0.9 * seconds))
        problem = disturb(process)
        found = problem or case.finish(folder)
        self.count(kind, case.name, expected, found)
        shutil.rmtree(folder)

    def count(self, kind: str, name: str, expected: str, found: str) -> None:
        """Note an outcome."""
        counted = self.counts.setdefault(kind, {"tried": 0, "equal": 0})
        counted["tried"] += 1
        counted["equal"] += found == expected
        if found != expected:
            print(f"DIFFERENT {kind}, {name}: {found}", flush=True)

    def kills(self, kind: str, count: int, cases: list[Case]) -> None:
        """SIGKILL."""
        for index in range(count):
            self.disturbed(kind, cases[index % len(cases)], _kill)

    def signals(self, count: int, cases: list[Case], program: Path) -> None:
        """SIGTERM, ctrl-C, and SLURM's USR1, which resume by themselves."""
        for signum in (signal.SIGTERM, signal.SIGINT):
            for index in range(count):
                self.disturbed("signals", cases[index % len(cases)], lambda p, s=signum: _signal(p, s))
        slurm = {f"SLURM_{k}": v for k, v in {"NTASKS": "1", "JOB_NAME": "sae", "JOB_ID": "4711", "PROCID": "0",
                                              "LOCALID": "0", "NODEID": "0"}.items()}  # fmt: skip
        for index in range(count):
            case = cases[index % len(cases)]
            expected, seconds = self.undisturbed(case)
            self.number += 1
            folder = self.work / f"{self.number} {case.name}"
            options = {"env": slurm | {"PATH": f"{program.parent}:{os.environ['PATH']}"}}
            words = [word for word in case.words if "resume" not in word]
            job = Case(case.name, words)
            process = job.start(folder, "--resume=null", **options)
            while process.poll() is None and not job.at_work(folder):
                time.sleep(0.005)
            time.sleep(self.random.random() * 0.9 * seconds)
            problem = _signal(process, signal.SIGUSR1)
            if problem is None:
                again = job.start(folder, "--resume=null", **options)
                problem = (
                    f"exit code {code}: {again.log.read_text()[-800:]}" if (code := again.wait()) else None
                )
            self.count("signals", f"{case.name} under SLURM", expected, problem or case.digest(folder))
            shutil.rmtree(folder)

    def disks(self, count: int, cases: list[Case]) -> None:
        """A disk that takes no file beyond a size, and a temporary folder on another file system."""
        other = Path("/dev/shm") if Path("/dev/shm").is_dir() else None
        for index in range(count):
            case = cases[index % len(cases)]
            expected, _ = self.undisturbed(case)
            self.number += 1
            folder = self.work / f"{self.number} {case.name}"
            limit = self.random.choice([2_000, 6_000, 12_000, 24_000, 48_000])
            process = case.start(folder, prepare=lambda n=limit: _limit_files(n))
            failed = process.wait() != 0
            torn = [str(p) for p in folder.rglob("*.tmp")] if failed else []
            found = f"left {torn}" if torn else case.finish(folder)
            self.count("disk_full", case.name, expected, found)
            shutil.rmtree(folder)
            if other is not None:
                before = set(other.iterdir())
                process = case.start(folder, env={"TMPDIR": str(other)})
                code = process.wait()
                left = set(other.iterdir()) - before
                found = f"exit code {code}" if code else f"left {left}" if left else case.digest(folder)
                self.count("other_file_system", case.name, expected, found)
                shutil.rmtree(folder)


def _kill(process: Process) -> str | None:
    if process.poll() is None:
        process.kill()
        process.wait()
    return None


def _signal(process: Process, signum: int) -> str | None:
    """What is wrong with how it ended, or None. Before it trains, any end is right."""
    if process.poll() is not None:
        return None
    os.kill(process.pid, signum)
    code = process.wait()
    right = {signal.SIGTERM: (75, 143, -15), signal.SIGINT: (130, -2), signal.SIGUSR1: (75, -10)}[
        signal.Signals(signum)
    ]
    return None if code in (0, *right) else f"exit code {code}: {process.log.read_text()[-800:]}"


def _limit_files(n_bytes: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writing then fails as on a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, n_bytes))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, help="file for the counts")
    parser.add_argument(
        "--count", type=int, help="of each kind; default: 50 kills, 20 of each signal, 10 disks"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the instants")
    options = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    import aen_lightning.cli.harvest
    import aen_lightning.cli.refit
    import aen_lightning.cli.sweep
    import aen_lightning.cli.training  # noqa: F401  # before the forks

    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        program = work / "bin" / "scontrol"
        program.parent.mkdir()
        program.write_text("#!/bin/sh\n")
        program.chmod(0o755)
        faults = Faults(work, make_cases(work), options.seed)
        training = [case for case in faults.cases if not case.harvests]
        harvests = [case for case in faults.cases if case.harvests]
        faults.kills("train", options.count or 50, training)
        faults.kills("harvest", options.count or 50, harvests)
        faults.signals(options.count or 20, [case for case in training if case.ranks == 1], program)
        faults.disks(options.count or 10, [case for case in faults.cases if case.ranks == 1])
    for kind, counted in faults.counts.items():
        print(f"{kind:<18} {counted['equal']:>4} of {counted['tried']}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(faults.counts, indent=1) + "\n")
    sys.exit(any(counted["equal"] < counted["tried"] for counted in faults.counts.values()))


if __name__ == "__main__":
    main()
