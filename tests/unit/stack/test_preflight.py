"""Each thing that would stop the stack is reported in one line with its remedy: real sockets, directories, servers."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from gateway.stack import commands, local, lock, models, preflight, trial_tiers
from gateway.stack.demo_model import THINK, THOUGHT
from gateway.stack.errors import StackError
from tests.support.gateway_process import ROOT
from tests.support.local_stack import plan_for

pytestmark = pytest.mark.local


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


@pytest.fixture
def free_port() -> int:
    return local.free_ports(1)[0]


def options(tmp_path: Path, port: int, **more: object) -> local.LocalStack:
    return local.LocalStack(data_dir=tmp_path / "data", port=port, **{"demo": "random", **more})  # type: ignore[arg-type]


def refusal(stack: local.LocalStack) -> str:
    with pytest.raises(StackError) as refused:
        preflight.check(stack)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_valid_options_pass_and_create_a_private_directory(tmp_path: Path, free_port: int) -> None:
    preflight.check(options(tmp_path, free_port))
    assert (tmp_path / "data").stat().st_mode & 0o777 == 0o700


def test_a_port_in_use_is_named_with_the_option_and_its_owner(tmp_path: Path, listener: socket.socket) -> None:
    port = listener.getsockname()[1]
    said = refusal(options(tmp_path, port))
    assert (
        said == f"port {port} on 127.0.0.1 is in use by process {os.getpid()}; stop that or choose another with --port"
    )


def test_an_engine_port_in_use_names_its_own_option(tmp_path: Path, listener: socket.socket, free_port: int) -> None:
    said = refusal(options(tmp_path, free_port, engine_port=listener.getsockname()[1]))
    assert said.endswith("choose another with --engine-port")


def test_an_address_of_another_machine_is_not_called_a_port_in_use(tmp_path: Path, free_port: int) -> None:
    with pytest.raises(StackError, match=r"cannot listen on 192\.0\.2\.77 port"):
        preflight.check_port("192.0.2.77", free_port, "--port")


def test_a_missing_package_names_the_extra() -> None:
    with pytest.raises(
        StackError, match=r"no_such_engine is not installed; in a clone .*`make up`, or `pip install '\.\[gpu\]'`"
    ):
        preflight.check_packages(("json", "no_such_engine"))


def test_other_platforms_are_referred_to_serve() -> None:
    with pytest.raises(StackError, match="needs Linux, not darwin; run `cwg serve`"):
        preflight.check_platform("darwin")


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.5", "::"])
def test_a_host_beyond_loopback_needs_a_key(host: str) -> None:
    with pytest.raises(StackError, match="set CWG_API_KEY first"):
        preflight.check_key(host, "")
    preflight.check_key(host, "k")


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_loopback_needs_no_key(host: str) -> None:
    preflight.check_key(host, "")


@pytest.mark.parametrize("chunk_size", [0, -64, 33, 65])
def test_a_chunk_that_is_not_whole_blocks_is_refused(tmp_path: Path, free_port: int, chunk_size: int) -> None:
    assert f"--chunk-size {chunk_size} is not a multiple" in refusal(
        options(tmp_path, free_port, chunk_size=chunk_size)
    )


def test_a_chunk_of_whole_blocks_passes(tmp_path: Path, free_port: int) -> None:
    preflight.check(options(tmp_path, free_port, chunk_size=96))


def test_more_context_than_the_demo_has_is_refused(tmp_path: Path, free_port: int) -> None:
    said = refusal(options(tmp_path, free_port, max_model_len=40_000))
    assert said == "--max-model-len 40000: the demo model goes up to 32768"
    said = refusal(options(tmp_path, free_port, demo=None, max_model_len=10_000))
    assert said.endswith(": the demo model goes up to 8192; --demo random goes up to 32768")


def test_a_demo_beside_another_model_is_refused(tmp_path: Path, free_port: int) -> None:
    said = refusal(options(tmp_path, free_port, model="somebody/a-model"))
    assert said == "--demo and --model exclude each other"


def test_missing_model_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StackError, match="no such directory"):
        models.find(str(tmp_path / "gone"))


def test_a_directory_without_configuration_is_refused(tmp_path: Path, free_port: int) -> None:
    (tmp_path / "model").mkdir()
    said = refusal(options(tmp_path, free_port, demo=None, model=str(tmp_path / "model")))
    assert "has no config.json" in said


def test_model_that_is_not_cached_is_refused_offline(tmp_path: Path) -> None:
    said = _find_in_a_process("somebody/a-model", {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)})
    assert said == "--model somebody/a-model: not in the local cache, and HF_HUB_OFFLINE forbids the download"


def test_cached_model_is_found_offline(tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "models--somebody--a-model"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    assert _find_in_a_process("somebody/a-model", {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}) == str(snapshot)


def test_download_from_an_unreachable_hub_fails_in_one_line(tmp_path: Path, free_port: int) -> None:
    hub = {"HF_ENDPOINT": f"http://127.0.0.1:{free_port}", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    said = _find_in_a_process("somebody/a-model", hub)
    assert said.startswith("--model somebody/a-model: the download failed (")
    assert said.endswith("); give a directory to work offline")


def test_data_directory_that_cannot_be_created_is_refused(tmp_path: Path, free_port: int) -> None:
    (tmp_path / "data").write_text("a file")
    assert "cannot write to" in refusal(options(tmp_path, free_port))


def test_too_little_space_is_reported_in_numbers() -> None:
    with pytest.raises(StackError, match=r"^0\.5 GiB of memory are free, 2\.0 GiB are needed: buy some$"):
        preflight.check_room("of memory", 2**29, 2**31, "buy some")


def test_more_memory_than_the_machine_has_is_refused(tmp_path: Path, free_port: int) -> None:
    plan = plan_for(options(tmp_path, free_port, cpu_cache_gb=1e6))
    with pytest.raises(StackError, match=r"GiB of memory are free, 1\d{6}\.\d GiB are needed: lower --cpu-cache-gb"):
        preflight.check_memory(plan)


def test_the_demo_needs_no_more_memory_than_the_readme_asks_for(
    tmp_path: Path, free_port: int, demo_folder: Path
) -> None:
    shutil.copytree(demo_folder, tmp_path / "data" / "models" / demo_folder.name)
    (asked,) = re.findall(r"(\d+) GiB of free memory", (ROOT / "README.md").read_text())
    needed = preflight.needed_memory(local.plan(options(tmp_path, free_port)))
    assert 3 * 2**30 < needed < int(asked) * 2**30


def test_more_engine_kv_than_shared_memory_is_refused() -> None:
    preflight.check_shared_memory(2**20)
    with pytest.raises(StackError, match=r"GiB in /dev/shm are free, 1\d{6}\.\d GiB are needed: remount it larger"):
        preflight.check_shared_memory(10**6 * 2**30)


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("rediss://h:1", "has no TLS"),
        ("redis://h:1/3", "database 0 only"),
        ("redis://h:1?ssl_cert_reqs=none", "database 0 only"),
        ("http://h:1", "expected redis://"),
        ("redis://", "expected redis://"),
    ],
)
def test_redis_that_lmcache_cannot_use_is_refused(url: str, reason: str) -> None:
    with pytest.raises(StackError, match=reason):
        trial_tiers.redis_address(url)


def test_unreachable_redis_is_refused(tmp_path: Path, free_port: int) -> None:
    said = refusal(options(tmp_path, free_port, redis_url=f"redis://127.0.0.1:{free_port}"))
    assert "no answer from Redis" in said


def test_a_wrong_redis_password_is_refused_and_not_repeated(tmp_path: Path) -> None:
    with _redis(tmp_path, "right") as port:
        preflight.check_redis(f"redis://:right@127.0.0.1:{port}/0")
        with pytest.raises(StackError, match="no answer from Redis") as refused:
            preflight.check_redis(f"redis://:wr0ng-one@127.0.0.1:{port}")
        assert "wr0ng-one" not in str(refused.value)


def test_a_redis_password_goes_by_the_environment(tmp_path: Path) -> None:
    command = commands.cache_launch(plan_for(options(tmp_path, 1, redis_url="redis://user:s%40crt@h:7777")))
    assert not any("crt" in argument for argument in command.argv)
    assert command.env["LMCACHE_RESP_PASSWORD"] == "s@crt"
    assert {"type": "resp", "host": "h", "port": 7777, "num_workers": 2} in [
        json.loads(argument) for argument in command.argv if argument.startswith("{")
    ]


@pytest.mark.parametrize("on_cpu", [True, False])
def test_only_a_cpu_engine_gets_cpu_options(tmp_path: Path, on_cpu: bool) -> None:
    launch = commands.engine_launch(plan_for(options(tmp_path, 1), on_cpu=on_cpu))
    assert ("--block-size" in launch.argv) == on_cpu
    assert ("--enforce-eager" in launch.argv) == on_cpu
    assert ("--kv-cache-memory-bytes" in launch.argv) == on_cpu
    connector = json.loads(launch.argv[launch.argv.index("--kv-transfer-config") + 1])
    assert ("lmcache.mp.mp_transfer_mode" in connector["kv_connector_extra_config"]) == on_cpu
    assert connector["kv_load_failure_policy"] == "recompute"


def test_an_engine_computes_in_the_type_of_its_model_by_default(tmp_path: Path) -> None:
    assert "--dtype" not in commands.engine_launch(plan_for(options(tmp_path, 1))).argv
    argv = commands.engine_launch(plan_for(options(tmp_path, 1), dtype="float32")).argv
    assert argv[argv.index("--dtype") + 1] == "float32"


@pytest.mark.parametrize("on_cpu", [True, False])
@pytest.mark.parametrize("is_demo", [True, False])
def test_scheduler_and_worker_are_one_process_for_the_demo_on_a_cpu(
    tmp_path: Path, on_cpu: bool, is_demo: bool
) -> None:
    launch = commands.engine_launch(plan_for(options(tmp_path, 1), on_cpu=on_cpu, demo="smollm2" if is_demo else None))
    assert ("uni" in launch.argv) == (on_cpu and is_demo)
    assert (launch.env.get("VLLM_ENABLE_V1_MULTIPROCESSING") == "0") == (on_cpu and is_demo)


def test_the_random_models_engine_gets_its_reasoning_marks(tmp_path: Path) -> None:
    for demo in (None, "smollm2"):
        plain = commands.engine_launch(plan_for(options(tmp_path, 1), demo=demo)).argv
        assert not any("reasoning" in argument for argument in plain)
    argv = commands.engine_launch(plan_for(options(tmp_path, 1))).argv
    assert argv[argv.index("--reasoning-parser") + 1] == "deepseek_v3"
    marks = json.loads(argv[argv.index("--reasoning-config") + 1])
    assert marks == {"reasoning_start_str": THINK, "reasoning_end_str": THOUGHT}


def test_a_second_stack_on_a_data_directory_is_refused(tmp_path: Path) -> None:
    refused = pytest.raises(StackError, match=f"in use by process {os.getpid()}; stop that one or pass another")
    with lock.holding(tmp_path, 8700), refused, lock.holding(tmp_path, 8701):
        pass
    with lock.holding(tmp_path, 8702):
        assert lock.holder(tmp_path) == (os.getpid(), 8702)


def test_a_data_directory_without_a_stack_has_no_holder(tmp_path: Path) -> None:
    assert lock.holder(tmp_path) is None
    with lock.holding(tmp_path, 8700):
        pass
    assert lock.holder(tmp_path) is None


@pytest.mark.parametrize(("setting", "limited"), [("", True), ("5", False), ("disk_budget_bytes = 5", False)])
def test_the_disk_tier_has_a_limit_unless_the_user_sets_one(
    tmp_path: Path, demo_folder: Path, monkeypatch: pytest.MonkeyPatch, setting: str, limited: bool
) -> None:
    monkeypatch.delenv("CWG_DISK_BUDGET_BYTES", raising=False)
    if setting.isdigit():
        monkeypatch.setenv("CWG_DISK_BUDGET_BYTES", setting)
    (tmp_path / "gateway.toml").write_text("" if setting.isdigit() else setting)
    shutil.copytree(demo_folder, tmp_path / "data" / "models" / demo_folder.name)
    plan = local.plan(options(tmp_path, 1, config=tmp_path / "gateway.toml"))
    budget = commands.gateway_launch(plan).env.get("CWG_DISK_BUDGET_BYTES")
    assert (budget is not None) == limited
    if budget:
        assert 0 < int(budget) <= shutil.disk_usage(tmp_path).total * local.DISK_SHARE


def _find_in_a_process(model: str, environment: dict[str, str]) -> str:
    """huggingface_hub reads its environment when it is imported."""
    script = (
        "import sys\nfrom gateway.stack import models\nfrom gateway.stack.errors import StackError\n"
        "try:\n    print(models.find(sys.argv[1]))\nexcept StackError as error:\n    print(error)\n"
    )
    argv = [sys.executable, "-c", script, model]
    done = subprocess.run(argv, env={**os.environ, **environment}, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@contextmanager
def _redis(directory: Path, password: str) -> Iterator[int]:
    binary = trial_tiers.valkey_server()
    port = local.free_ports(1)[0]
    argv = [str(binary), "--port", str(port), "--bind", "127.0.0.1", "--requirepass", password, "--save", ""]
    with subprocess.Popen([*argv, "--dir", str(directory)], stdout=subprocess.PIPE, text=True) as server:
        try:
            next(line for line in server.stdout or () if "Ready to accept connections" in line)
            yield port
        finally:
            server.kill()


def test_versions_without_the_patch_are_named() -> None:
    assert preflight.version_warning(preflight.installed_versions()) == ""
    assert "vllm 0.33.0" in preflight.version_warning({"vllm": "0.33.0", "lmcache": "0.5.6"})
