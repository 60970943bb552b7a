"""The gateway's image, built by buildah on a bootstrapped Debian and run as Docker would run it.

There is neither a Docker daemon nor a registry of images here. So the base is bootstrapped once (and kept, as
`localhost/cwg-test-base`), and the command of the image runs as process 1 of namespaces of its own, as the image's
user, with a root that cannot be written.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.fakes.engine import DONE, MODEL, Exchange, FakeEngine, delta
from tests.support.gateway_process import ROOT, Gateway, eventually
from tests.support.raw_http import RawHttpClient
from tests.support.tier_harness import RedisServer

BASE = "localhost/cwg-test-base"
KEY = "k3y-of-the-image"
EXTRAS = ("postgres", "s3")
USER = 10001
COMPILERS = {"cc", "c++", "gcc", "g++", "clang", "tcc", "ld", "as", "make", "cpp", "rustc", "cargo", "go"}
_PACKAGES = "base-files,base-passwd,coreutils,dash,libc-bin,login,passwd,python3,python3-venv"
_OF_AN_INDEX = {"index-url", "extra-index-url", "cert", "client-cert", "proxy", "trusted-host", "default-timeout"}
_MISSING = [name for name in ("buildah", "mmdebstrap") if shutil.which(name) is None]
_RUN = """set -eu
mount --bind "$ROOT" "$ROOT"
mount -o remount,bind,ro "$ROOT"
mount --bind "$DATA" "$ROOT/data"
mount -o "remount,bind,$DATA_MODE" "$ROOT/data"
mount -t tmpfs tmpfs "$ROOT/tmp"
mount -t proc proc "$ROOT/proc"
mount --rbind /dev "$ROOT/dev"
exec chroot --userspec="$USERSPEC" "$ROOT" env -i "$@"
"""

pytestmark = [
    pytest.mark.timeout(900),  # bootstrapping a base takes a minute or two
    pytest.mark.skipif(bool(_MISSING), reason=f"needs {' and '.join(_MISSING)}: apt-get install buildah mmdebstrap"),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: namespaces and mounts are made without a daemon"),
]


def buildah(*arguments: str) -> str:
    """Run buildah and return what it prints."""
    done = subprocess.run(
        ["buildah", "--storage-driver", "vfs", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"buildah {arguments}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout.strip()


def bootstrap(folder: Path) -> None:
    """Make the base image: what the Dockerfile needs of Debian, and no compiler. Only unpacked: a third of the time."""
    tar = folder / "base.tar"
    hooks = [f'--customize-hook=cp "$1/usr/share/base-passwd/{x}.master" "$1/etc/{x}"' for x in ("passwd", "group")]
    argv = ["mmdebstrap", "--quiet", "--variant=extract", f"--include={_PACKAGES}", *hooks, "bookworm", str(tar)]
    subprocess.run(argv, check=True)
    container = buildah("from", "scratch")
    buildah("add", container, str(tar))
    buildah("commit", "--rm", container, BASE)


def own_index(folder: Path) -> list[str]:
    """Options of the build that hand in how pip reaches the index from this machine; folders of it are left out."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    ).stdout
    pairs = (line.partition("=") for line in listed.splitlines())
    values = {name.rpartition(".")[2]: value.strip("'") for name, _, value in pairs}
    ours = {name: value for name, value in values.items() if name in _OF_AN_INDEX and "file:" not in value}
    (folder / "pip.conf").write_text("[global]\n" + "".join(f"{name} = {value}\n" for name, value in ours.items()))
    mounts = [f"--volume={value}:{value}:ro" for value in ours.values() if Path(value).is_file()]
    return [f"--secret=id=pip,src={folder / 'pip.conf'}", *mounts]


@dataclass(frozen=True, slots=True)
class Image:
    """A built image: its configuration, and its files."""

    config: dict[str, Any]
    root: Path


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Image]:
    """The image `gateway`, whose files are mounted; both are removed at the end, the base stays."""
    folder = tmp_path_factory.mktemp("image")
    if not buildah("images", "--quiet", "--filter", f"reference={BASE}"):
        bootstrap(folder)
    name = f"localhost/cwg-test-{os.getpid()}"
    build = ["bud", "--isolation", "chroot", "--network", "host", "--format", "docker", "--target", "gateway"]
    buildah(*build, *own_index(folder), "--build-arg", f"BASE={BASE}", "--tag", name, ".")
    container = buildah("from", name)
    try:
        config = json.loads(buildah("inspect", "--type", "image", name))["Docker"]["config"]
        yield Image(config, Path(buildah("mount", container)))
    finally:
        buildah("rm", container)
        buildah("rmi", "--force", name)


class Container(Gateway):
    """The image's command, as process 1 of its own namespaces."""

    def __init__(self, image: Image, folder: Path, engine_url: str, user: int = USER, **settings: object) -> None:
        super().__init__(folder, engine_url, **settings)
        self.image = image
        self.user = user
        self.data_mode = "rw"
        self.data_dir.mkdir()
        os.chown(self.data_dir, user, user)
        self.data_dir.chmod(0o700)

    def start(self) -> "Container":
        """Start it, without waiting for it."""
        with self._log.open("ab") as log:
            self.process = self._popen([*self.image.config["Entrypoint"], *self.image.config["Cmd"]], log)
        return self

    def healthcheck(self) -> int:
        """The exit status of the image's own check."""
        kind, *command = self.image.config["Healthcheck"]["Test"]
        assert kind == "CMD"
        with self._log.open("ab") as log:
            return self._popen(command, log).wait(30)

    @property
    def pid(self) -> int:
        """The gateway's process id outside."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        eventually(lambda: bool(children.read_text().strip()), "the process is there", more=lambda: self.log)
        return int(children.read_text())

    def stop(self) -> int:
        """As `docker stop` does it."""
        os.kill(self.pid, signal.SIGTERM)
        return self.process.wait(60)

    def close(self) -> None:
        """End it whatever state it is in: with its process 1 all others of the container end."""
        if self.process.poll() is None:
            os.kill(self.pid, signal.SIGKILL)
            self.process.wait()
        super().close()

    def _popen(self, command: list[str], log: Any) -> "subprocess.Popen[bytes]":
        ours = {name: value for name, value in self._environment.items() if name.startswith("CWG_")}
        del ours["CWG_DATA_DIR"]  # the image's own
        variables = [*self.image.config["Env"], *(f"{name}={value}" for name, value in ours.items())]
        mounts = {
            "ROOT": str(self.image.root),
            "DATA": str(self.data_dir),
            "DATA_MODE": self.data_mode,
            "USERSPEC": f"{self.user}:{self.user}",
        }
        alone = ["unshare", "--mount", "--pid", "--fork", "sh", "-c", _RUN, "sh"]
        return subprocess.Popen([*alone, *variables, *command], env=os.environ | mounts, stdout=log, stderr=log)


@pytest.fixture
def container(image: Image, engine: FakeEngine, tmp_path: Path) -> Iterator[Container]:
    """A container that is not started."""
    container = Container(image, tmp_path, engine.url, api_key=KEY)
    yield container
    if hasattr(container, "process"):
        container.close()


def refusal(container: Container) -> str:
    """The one line of a container that does not start."""
    assert container.start().process.wait(30) == 1
    (line,) = [line for line in container.log.splitlines() if " INFO " not in line and " WARNING " not in line]
    assert line.startswith("error: ")
    return line


def test_it_answers_as_its_own_user_on_a_root_that_cannot_be_written(
    container: Container, engine: FakeEngine, session: str
) -> None:
    container.start().wait("/healthz").wait()
    status = Path(f"/proc/{container.pid}/status").read_text()
    assert f"\nUid:\t{USER}\t{USER}\t{USER}\t{USER}\n" in status
    assert "\nCapEff:\t0000000000000000\n" in status
    assert container.chat(session).status_code == 200
    assert container.freeze(session, "w").status_code == 201
    assert {"gateway.db", "secret"} <= {path.name for path in container.data_dir.iterdir()}
    assert container.healthcheck() == 0
    assert container.stop() == 0
    assert container.healthcheck() == 1


def test_it_starts_on_postgresql_and_valkey_by_environment_alone(
    image: Image, engine: FakeEngine, tmp_path: Path, session: str, postgres_url: str, redis_server: RedisServer
) -> None:
    """What one has recorded the next one finds, which has the store and the secret, and none of the files."""
    places = {
        "store_url": postgres_url,
        "kv_redis_url": f"redis://127.0.0.1:{redis_server.port}",
        "secret_file": "/data/salts",
    }
    for count in (1, 2):
        folder = tmp_path / str(count)
        folder.mkdir()
        container = Container(image, folder, engine.url, api_key=KEY, **places)
        (container.data_dir / "salts").write_text("0123456789abcdef" * 4)
        os.chown(container.data_dir / "salts", USER, USER)
        try:
            container.start().wait("/healthz").wait()
            assert container.chat(session).status_code == 200
            assert len(container.turns(session, count)) == count
            (tiers,) = container.http.get("/admin/health", params={"component": "tiers"}).json()["components"].values()
            assert (tiers["status"], tiers["message"]) == ("healthy", "redis")
            assert container.stop() == 0
        finally:
            container.close()
        assert not list(container.data_dir.glob("gateway.db*"))


def test_without_a_key_it_does_not_start_and_names_the_variable(
    image: Image, engine: FakeEngine, tmp_path: Path
) -> None:
    line = refusal(Container(image, tmp_path, engine.url))
    assert "0.0.0.0" in line
    assert "CWG_API_KEY" in line


def test_a_data_directory_that_cannot_be_written_is_one_clear_line(container: Container) -> None:
    container.data_mode = "ro"
    assert "make data_dir writable" in refusal(container)


def test_another_user_needs_a_data_directory_of_its_own(image: Image, engine: FakeEngine, tmp_path: Path) -> None:
    container = Container(image, tmp_path, engine.url, user=USER + 1, api_key=KEY)
    os.chown(container.data_dir, USER, USER)
    assert "make data_dir writable" in refusal(container)
    os.chown(container.data_dir, USER + 1, USER + 1)
    try:
        container.start().wait("/healthz")
    finally:
        container.close()


def test_sigterm_lets_a_stream_end_and_records_it(container: Container, engine: FakeEngine, session: str) -> None:
    asked_to_stop = threading.Event()

    def answer(exchange: Exchange) -> None:
        exchange.begin()
        exchange.chunk(delta(content="one"))
        assert asked_to_stop.wait(5)
        exchange.chunk(delta(content="two"))
        exchange.chunk(DONE)
        exchange.end()

    engine.on_chat = answer
    container.start().wait()
    with RawHttpClient(container.url) as wire:
        asked = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "stream": True}
        wire.post("/v1/chat/completions", json.dumps(asked).encode(), f"x-session-id: {session}", f"x-api-key: {KEY}")
        wire.head()
        assert wire.chunk() == delta(content="one")
        os.kill(container.pid, signal.SIGTERM)
        eventually(lambda: not _accepts(container.port), "no new connection is taken")
        asked_to_stop.set()
        assert wire.chunks() == [delta(content="two"), DONE]
    assert container.process.wait(15) == 0
    container.start().wait()
    (turn,) = container.turns(session)
    assert turn["outcome"] == "completed"


def _accepts(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


def test_the_image_has_no_compiler_no_wheels_and_no_configuration_of_pip(image: Image) -> None:
    programs = {
        path.name for folder in ("usr/bin", "usr/local/bin", "opt/cwg/bin") for path in image.root.glob(f"{folder}/*")
    }
    assert "python3" in programs
    assert [name for name in programs if COMPILERS & set(name.split("-"))] == []  # x86_64-linux-gnu-gcc-12 too
    assert not list(image.root.glob("wheels/*"))
    pip = image.root / "etc/pip.conf"
    assert not pip.exists() or pip.stat().st_size == 0


def test_the_image_has_what_the_gateway_needs_for_a_team(image: Image) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(name for extra in EXTRAS for name in project["optional-dependencies"][extra])]
    installed = {
        path.name.partition("-")[0] for path in image.root.glob("opt/cwg/lib/python3*/site-packages/*.dist-info")
    }
    assert {re.split(r"[^\w.-]", name)[0].lower().replace("-", "_") for name in wanted} <= {
        n.lower() for n in installed
    }


def test_the_configuration_says_who_runs_what(image: Image) -> None:
    assert image.config["User"] == f"{USER}:{USER}"
    assert image.config["Entrypoint"] == ["cwg"]  # not through a shell, which would keep the signals to itself
    assert "/data" in image.config["Volumes"]
    assert image.config["Labels"]["org.opencontainers.image.licenses"] == "Apache-2.0"
    (owner,) = {(path.stat().st_uid, path.stat().st_mode & 0o777) for path in (image.root / "data", image.root / "kv")}
    assert owner == (USER, 0o700)
