"""Settings: every row from every source, precedence, what is refused and how, and the table in docs/settings.md."""

from pathlib import Path
from typing import Any

import pytest

from gateway.settings import Settings, SettingsError, load, table
from gateway.validation.addresses import EngineEntry
from gateway.validation.old_names import old_variables
from gateway.windows.autofreeze import rules
from tests.support.gateway_process import ROOT

# Another value than the default for each row, as text and as TOML.
OTHER: dict[str, tuple[str, str, Any]] = {
    "host": ("localhost", '"localhost"', "localhost"),
    "port": ("9", "9", 9),
    "workers": ("3", "3", 3),
    "worker_timeout_s": ("5", "5", 5.0),
    "api_key": ("k", '"k"', "k"),
    "allowed_origins": ("https://a.b", '["https://a.b"]', ("https://a.b",)),
    "extra_paths": ("POST /v1/x,* /v1/y", '["POST /v1/x", "* /v1/y"]', ("POST /v1/x", "* /v1/y")),
    "engine_urls": ("https://e:1/x, http://f", '["https://e:1/x", "http://f"]', ("https://e:1/x", "http://f")),
    "engines": (
        '[{"url": "http://e", "cache_url": "http://c"}, {"discover": "e:1", "cache_port": 2}]',
        '[{url = "http://e", cache_url = "http://c"}, {discover = "e:1", cache_port = 2}]',
        (EngineEntry(url="http://e", cache_url="http://c"), EngineEntry(discover="e:1", cache_port=2)),
    ),
    "engine_api_key": ("e", '"e"', "e"),
    "engine_check_s": ("2", "2", 2.0),
    "cache_url": ("http://c", '"http://c"', "http://c"),
    "kv_dir": ("kv", '"kv"', "kv"),
    "kv_redis_url": ("rediss://r:1/2", '"rediss://r:1/2"', "rediss://r:1/2"),
    "kv_redis_adapter": ("valkey", '"valkey"', "valkey"),
    "kv_redis_prefix": ("team", '"team"', "team"),
    "kv_redis_cluster": ("true", "true", True),
    "s3_bucket": ("kv-1", '"kv-1"', "kv-1"),
    "s3_pins_bucket": ("pins-1", '"pins-1"', "pins-1"),
    "s3_endpoint": ("https://s3:9000", '"https://s3:9000"', "https://s3:9000"),
    "s3_region": ("eu-west-1", '"eu-west-1"', "eu-west-1"),
    "s3_path_style": ("true", "true", True),
    "s3_access_key_id": ("id", '"id"', "id"),
    "s3_secret_access_key": ("secret", '"secret"', "secret"),
    "pins_dir": ("p", '"p"', "p"),
    "chunk_size": ("16", "16", 16),
    "data_dir": ("d", '"d"', "d"),
    "store_url": ("sqlite:///x.db", '"sqlite:///x.db"', "sqlite:///x.db"),
    "store_statement_cache": ("0", "0", 0),
    "secret_file": ("s", '"s"', "s"),
    "accept_new_secret": ("true", "true", True),
    "isolation": ("tenant", '"tenant"', "tenant"),
    "identify": ("by_id", '"by_id"', "by_id"),
    "model_fingerprint": ("f", '"f"', "f"),
    "normalise": ("timestamp-line", '["timestamp-line"]', ("timestamp-line",)),
    "tokenizer_file": ("t", '"t"', "t"),
    "connect_timeout_s": ("0.5", "0.5", 0.5),
    "engine_timeout_s": ("1", "1", 1.0),
    "abort_grace_s": ("0", "0", 0.0),
    "client_timeout_s": ("1e1", "1e1", 10.0),
    "max_connections": ("12", "12", 12),
    "max_body_bytes": ("1", "1", 1),
    "max_json_values": ("6", "6", 6),
    "max_messages": ("7", "7", 7),
    "body_timeout_s": ("3", "3", 3.0),
    "max_import_bytes": ("1", "1", 1),
    "max_reply_bytes": ("2", "2", 2),
    "turn_queue": ("3", "3", 3),
    "turns_kept": ("4", "4", 4),
    "sessions_kept": ("5", "5", 5),
    "expiry_grace_s": ("0", "0", 0.0),
    "session_ttl_s": ("8", "8", 8.0),
    "disk_budget_bytes": ("10", "10", 10),
    "redis_budget_bytes": ("11", "11", 11),
    "tenant_budget_bytes": ("15", "15", 15),
    "disk_reserve_bytes": ("12", "12", 12),
    "gateway_lease_s": ("4.5", "4.5", 4.5),
    "sweep_every_s": ("9.5", "9.5", 9.5),
    "clock_hold_s": ("60", "60", 60.0),
    "responses_kept": ("44", "44", 44),
    "busy_wait_s": ("5.5", "5.5", 5.5),
    "on_full": ("successor", '"successor"', "successor"),
    "freeze_timeout_s": ("6", "6", 6.0),
    "thaw_timeout_s": ("7", "7", 7.0),
    "auto_freeze": ("no", "false", False),
    "auto_freeze_idle_minutes": ("30", "30", 30.0),
    "auto_freeze_tokens": ("100000", "100000", 100000),
    "auto_freeze_share": ("0.5", "0.5", 0.5),
    "auto_freeze_at_shutdown": ("true", "true", True),
    "auto_freeze_policies": ("a.b:C,d:E", '["a.b:C", "d:E"]', ("a.b:C", "d:E")),
    "auto_freeze_name": ("x-{timestamp}-{session_id}", '"x-{timestamp}-{session_id}"', "x-{timestamp}-{session_id}"),
    "auto_freeze_tags": ("a,auto", '["a", "auto"]', ("a", "auto")),
    "auto_freeze_cooldown_s": ("6", "6", 6.0),
    "auto_freeze_keep": ("7", "7", 7),
    "auto_freeze_ttl_days": ("0", "0", 0.0),
    "auto_freeze_every_s": ("1", "1", 1.0),
    "shutdown_grace_s": ("0", "0", 0.0),
    "shutdown_freeze_s": ("2", "2", 2.0),
    "log_level": ("debug", '"debug"', "debug"),
    "log_format": ("json", '"json"', "json"),
}
NAMES = list(Settings.model_fields)


def toml(folder: Path, text: str) -> Path:
    """A file of settings."""
    path = folder / "gateway.toml"
    path.write_text(text)
    return path


def test_this_file_knows_every_setting() -> None:
    assert list(OTHER) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_setting_is_read_from_every_source(tmp_path: Path, name: str) -> None:
    text, spelt, value = OTHER[name]
    default = getattr(Settings(), name)
    assert default != value
    assert getattr(load(environment={}), name) == default
    for got in (
        load(environment={f"CWG_{name.upper()}": text}),
        load(environment={}, file=toml(tmp_path, f"{name} = {spelt}")),
        load(environment={}, overrides={name: value}),
    ):
        assert getattr(got, name) == value
        assert type(getattr(got, name)) is type(default)
        assert [n for n in NAMES if getattr(got, n) != getattr(Settings(), n)] == [name]


def test_log_level_is_read_in_any_case() -> None:
    assert load(environment={"CWG_LOG_LEVEL": "INFO"}).log_level == "info"
    assert load(environment={}, overrides={"log_level": "Warning"}).log_level == "warning"


def test_variables_of_the_old_system_are_named_with_ours() -> None:
    names = ("CWM_VLLM__URL", "CWM_VLLM_URL", "CWM_LIMITS_MAX_WINDOWS", "CWM_DISK_CACHE_GB", "HOME")
    told = old_variables(dict.fromkeys(names, "1"))
    assert told == (
        "variables of cwm-mcp are ignored: CWM_DISK_CACHE_GB is CWG_DISK_BUDGET_BYTES (bytes) here, "
        "CWM_LIMITS_MAX_WINDOWS has no counterpart, "
        "CWM_VLLM_URL is CWG_ENGINE_URLS here, CWM_VLLM__URL is CWG_ENGINE_URLS here"
    )
    assert old_variables({"CWG_PORT": "1"}) == ""


def test_the_command_line_beats_the_environment_which_beats_the_file(tmp_path: Path) -> None:
    file = toml(tmp_path, "port = 1\nchunk_size = 1\nturns_kept = 1")
    environment = {"CWG_PORT": "2", "CWG_CHUNK_SIZE": "2"}
    got = load(file=file, environment=environment, overrides={"port": 3, "chunk_size": None})
    assert (got.port, got.chunk_size, got.turns_kept, got.turn_queue) == (3, 2, 1, 4096)


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("engine_url", "engine_urls"),
        ("chunksize", "chunk_size"),
        ("kv_redis", "kv_redis_url"),
        ("Port", "port"),
        ("zzz", ""),
    ],
)
def test_an_unknown_key_stops_the_start_and_names_the_nearest(tmp_path: Path, name: str, near: str) -> None:
    wanted = f"unknown setting '{name}'" + (f"; did you mean '{near}'?" if near else "")
    with pytest.raises(SettingsError) as refused:
        load(environment={}, file=toml(tmp_path, f'{name} = "x"'))
    assert str(refused.value) == f"{tmp_path / 'gateway.toml'}: {wanted}"
    if name.islower():
        with pytest.raises(SettingsError) as refused:
            load(environment={f"CWG_{name.upper()}": "x"})
        assert str(refused.value) == f"environment variable CWG_{name.upper()}: {wanted}"


def test_an_unknown_normaliser_rule_is_an_error_that_names_the_nearest() -> None:
    with pytest.raises(SettingsError, match="unknown rule 'claude-billing'; did you mean 'claude-billing-header'"):
        load(environment={"CWG_NORMALISE": "timestamp-line,claude-billing"})
    assert load(environment={"CWG_NORMALISE": ""}).normalise == ()


def test_each_mistake_is_named_with_its_source_at_once(tmp_path: Path) -> None:
    file = toml(tmp_path, "port = 1.5\nworkers = 0\nchunk_size = 'x'")
    with pytest.raises(SettingsError) as refused:
        load(file=file, environment={"CWG_PORT": "x", "CWG_PROT": "1"}, overrides={"workers": 257})
    assert str(refused.value).split("; ") == [
        "environment variable CWG_PORT: port must be a valid integer, not 'x'",
        "option --workers: workers must be less than or equal to 256, not 257",
        f"{file}: chunk_size must be a valid integer, not 'x'",
        "environment variable CWG_PROT: unknown setting 'prot'",
        "did you mean 'port'?",
    ]


def test_a_wrong_value_that_is_overridden_stops_the_start(tmp_path: Path) -> None:
    file = toml(tmp_path, "port = 1.5\nhost = '0.0.0.0'")
    with pytest.raises(SettingsError, match=r"gateway\.toml: port must be a valid integer, not 1\.5"):
        load(file=file, environment={"CWG_PORT": "1"}, overrides={"host": "localhost"})
    with pytest.raises(SettingsError, match=r"^environment variable CWG_PORT: port must be a valid integer, not 'x'$"):
        load(environment={"CWG_PORT": "x"}, overrides={"port": 5})


def test_a_host_that_needs_a_key_may_be_overridden(tmp_path: Path) -> None:
    file = toml(tmp_path, "host = '0.0.0.0'")
    assert load(file=file, environment={"CWG_HOST": "localhost"}).host == "localhost"


@pytest.mark.parametrize("line", ["api_key = 53137", "engine_api_key = [53137]", "kv_redis_url = 'redis://:53137@'"])
def test_a_secret_is_not_repeated(tmp_path: Path, line: str) -> None:
    with pytest.raises(SettingsError, match=line.partition(" ")[0]) as refused:
        load(environment={}, file=toml(tmp_path, line))
    assert "53137" not in str(refused.value)
    assert "53137" not in str(refused.value.__cause__)
    assert "53137" not in repr(Settings(api_key="53137", engine_api_key="53137", kv_redis_url="redis://:53137@x"))


@pytest.mark.parametrize("name", ["engine_urls", "cache_url"])
@pytest.mark.parametrize("url", ["http://u:s3cret@h:1", "http://s3cret@h", "http://:s3cret@h/x", "ftp://u:s3cret@h"])
def test_a_password_in_an_address_is_refused_and_not_repeated(name: str, url: str) -> None:
    with pytest.raises(SettingsError, match=f"{name} has a user name or password") as refused:
        load(environment={f"CWG_{name.upper()}": url})
    assert "s3cret" not in str(refused.value)
    assert load(environment={f"CWG_{name.upper()}": "http://h/@x"})  # in a path it is only a character


PAIR = '{"url": "http://a", "cache_url": "http://b"}'


@pytest.mark.parametrize(
    ("entries", "problem"),
    [
        (f"[{PAIR}, {PAIR}]", "engines has http://a more than once; give each engine once"),
        ('[{"url": "http://a"}, {"url": "http://A/"}]', "engines has http://a more than once"),
        ('[{"discover": "a:1"}, {"discover": "A:1"}]', "engines has a:1 more than once"),
        ("x", "engines is not a JSON list, as in "),
        (PAIR, "engines is not a JSON list, as in "),
        ("[1]", "engines[0] must be a valid table, with url and cache_url, not 1"),
        ("[{}]", "engines[0] needs either url, of one engine, or discover,"),
        ('[{"url": "http://a", "discover": "a:1"}]', "engines[0] needs either url, of one engine, or discover,"),
        ('[{"url": "http://a", "cache_port": 1}]', "engines[0] has url with cache_port or cache_discover"),
        ('[{"url": "http://a", "cache_discover": "a:1"}]', "engines[0] has url with cache_port or cache_discover"),
        ('[{"discover": "a:1", "cache_url": "http://b"}]', "give cache_port or cache_discover"),
        ('[{"discover": "a:1", "cache_port": 1, "cache_discover": "b:1"}]', "has cache_port and cache_discover"),
        (f'[{PAIR}, {{"url": "http://c", "cache": "x"}}]', "unknown setting 'engines[1].cache'"),
        ('[{"url": "http://a", "cache_ulr": "x"}]', "'engines[0].cache_ulr'; did you mean 'cache_url'?"),
        ('[{"url": "http://u:s3cret@a"}]', "engines[0].url has a user name or password"),
        ('[{"url": "a:1"}]', "engines[0].url 'a:1' is not an http(s) URL"),
        ('[{"discover": "http://a:1"}]', "engines[0].discover 'http://a:1' is not a name and a port"),
        ('[{"discover": "a"}]', "engines[0].discover 'a' is not a name and a port, as in 'engines:8000'"),
        ('[{"discover": "a:0"}]', "is not a name and a port"),
        ('[{"discover": "a:65536"}]', "is not a name and a port"),
        ('[{"discover": "a:1", "cache_port": 65536}]', "engines[0].cache_port must be less than or equal to 65535"),
        ('[{"discover": "a:1", "cache_port": "8080"}]', "engines[0].cache_port must be a valid integer, not '8080'"),
    ],
)  # fmt: skip
def test_entries_of_engines_that_contradict_themselves_stop_the_start(entries: str, problem: str) -> None:
    with pytest.raises(SettingsError) as refused:
        load(environment={"CWG_ENGINES": entries})
    assert str(refused.value).startswith("environment variable CWG_ENGINES: ")
    assert problem in str(refused.value)
    assert "s3cret" not in str(refused.value)


def test_short_and_long_form_of_the_engines_exclude_each_other(tmp_path: Path) -> None:
    file = toml(tmp_path, 'cache_url = "http://c"\n[[engines]]\nurl = "http://a"\ncache_url = "http://b"')
    with pytest.raises(SettingsError, match=r"^engines and cache_url exclude each other: give each engine as"):
        load(file=file, environment={})
    with pytest.raises(SettingsError, match="engines and engine_urls and cache_url exclude each other"):
        load(file=file, environment={"CWG_ENGINE_URLS": "http://a"})


def test_every_engine_has_its_cache_in_either_form(tmp_path: Path) -> None:
    pairs = [("http://a", "http://c"), ("http://b", "http://c")]
    short = load(environment={"CWG_ENGINE_URLS": "http://a,http://b", "CWG_CACHE_URL": "http://c"})
    assert [(one.url, one.cache_url) for one in short.nodes] == pairs
    tables = "\n".join(f'[[engines]]\nurl = "{url}"\ncache_url = "{cache}"' for url, cache in pairs)
    assert load(file=toml(tmp_path, tables), environment={}).nodes == short.nodes
    assert [Settings().has_cache, short.has_cache] == [False, True]


def test_foreign_variables_never_stop_the_start() -> None:
    foreign = {"PORT": "x", "CWGX": "1", "cwg_port": "1", "CWG_URL": "http://x", "VLLM_API_KEY": "k", "": ""}
    assert load(environment=foreign) == Settings()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("port", "x"), ("port", ""), ("port", "1.0"), ("port", "-1"), ("port", "65536"), ("port", "0x10"),
        ("chunk_size", "-1"), ("busy_wait_s", "0"), ("busy_wait_s", "-1"), ("busy_wait_s", "nan"), ("busy_wait_s", "x"),
        ("busy_wait_s", ""), ("max_body_bytes", "0"), ("max_reply_bytes", "-5"), ("turn_queue", "0"),
        ("max_connections", "0"),
        ("turns_kept", "0"), ("sessions_kept", "0"), ("workers", "0"), ("workers", "-1"), ("workers", "257"),
        ("workers", "auto"),
        ("engine_urls", "localhost:8000"), ("engine_urls", "ftp://x"), ("engine_urls", "http://"),
        ("engine_urls", "http://a,"), ("engine_urls", "http://a:99999"), ("engine_urls", "http://a,http://b,http://A/"),
        ("engine_urls", "http://a,ftp://b"), ("engine_check_s", "0"),
        ("cache_url", "localhost"), ("kv_redis_url", "http://x"), ("kv_redis_url", "redis://"),
        ("store_url", "redis://x"), ("store_url", "/path"), ("isolation", "none"), ("isolation", ""),
        ("on_full", "cut"),
        ("log_level", "trace"), ("host", "0.0.0.0"), ("host", ""), ("host", "::"),
        ("engine_urls", ""), ("expiry_grace_s", "-1"), ("session_ttl_s", "-1"), ("session_ttl_s", "nan"),
        ("sweep_every_s", "0"), ("disk_budget_bytes", "-1"), ("redis_budget_bytes", "1.5"), ("disk_reserve_bytes", "0"),
        ("auto_freeze", "maybe"), ("auto_freeze_idle_minutes", "-1"),
        ("auto_freeze_tokens", "-1"), ("auto_freeze_share", "1.1"), ("auto_freeze_name", "auto"),
        ("auto_freeze_name", "auto-{session_id}-{timestamp}-{nope}"), ("auto_freeze_keep", "0"),
        ("auto_freeze_tags", "not a tag"),
    ],
)  # fmt: skip
def test_a_value_that_does_not_fit_is_refused_and_named(name: str, text: str) -> None:
    with pytest.raises(SettingsError, match=name):
        rules.from_settings(load(environment={f"CWG_{name.upper()}": text}))


@pytest.mark.parametrize(
    "line",
    ["port = 1.5", "port = true", 'port = []', "busy_wait_s = true", "host = 1", "engine_urls = 5", "engine_urls = []",
     "auto_freeze = 1", "api_key = true", "turns_kept = '0'", "[port]\nx = 1"],
)  # fmt: skip
def test_a_value_of_another_type_in_the_file_is_refused_and_named(tmp_path: Path, line: str) -> None:
    with pytest.raises(SettingsError, match=line.strip("[").split()[0].strip("]")):
        load(environment={}, file=toml(tmp_path, line))


def test_a_file_that_cannot_be_read_is_refused_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"cannot read .*missing\.toml: No such file"):
        load(environment={}, file=tmp_path / "missing.toml")
    with pytest.raises(SettingsError, match=r"gateway\.toml is not TOML"):
        load(environment={}, file=toml(tmp_path, "port: 1"))
    (tmp_path / "gateway.toml").write_bytes(b'host = "\xff"')
    with pytest.raises(SettingsError, match=r"gateway\.toml is not TOML"):
        load(environment={}, file=tmp_path / "gateway.toml")


def test_every_web_page_may_read_only_with_a_key() -> None:
    with pytest.raises(SettingsError, match="allowed_origins '\\*' lets every web page read"):
        load(environment={"CWG_ALLOWED_ORIGINS": "*"})
    assert load(environment={"CWG_ALLOWED_ORIGINS": "*", "CWG_API_KEY": "k"}).allowed_origins == ("*",)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org", "127.0.0.1.example.org"])
def test_beyond_loopback_there_is_a_key(host: str) -> None:
    with pytest.raises(SettingsError, match="api_key"):
        load(environment={"CWG_HOST": host})
    assert load(environment={"CWG_HOST": host, "CWG_API_KEY": "k"}).host == host


def test_paths_follow_from_the_data_dir_unless_they_are_given(tmp_path: Path) -> None:
    plain = Settings(data_dir=str(tmp_path / "d"), kv_dir=str(tmp_path / "kv"))
    assert (plain.store_path, plain.secret_path) == (tmp_path / "d" / "gateway.db", tmp_path / "d" / "secret")
    assert (plain.kv_path, plain.pins_path) == (tmp_path / "kv", tmp_path / "kv-pins")
    given = Settings(
        store_url=f"sqlite:///{tmp_path}/x.db",
        secret_file=str(tmp_path / "s"),
        pins_dir=str(tmp_path / "p"),
        kv_dir="kv",
    )
    assert (given.store_path, given.secret_path, given.pins_path) == (tmp_path / "x.db", tmp_path / "s", tmp_path / "p")
    assert (Settings().kv_path, Settings().pins_path) == (None, None)
    assert all(p.is_absolute() for p in (given.kv_path, Settings().store_path, Settings(data_dir="~/x").data_path) if p)


def test_docs_have_every_setting_as_the_code_has_it() -> None:
    _, rest = (ROOT / "docs/settings.md").read_text().split("<!-- settings -->")
    listed, _ = rest.split("<!-- /settings -->")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in listed.strip().splitlines()]
    assert rows[0] == ["setting", "default", "meaning"]
    assert set(rows[1]) == {"---"}
    assert rows[2:] == [[f"`{name}`", f"`{default}`" if default else "", text] for name, default, text in table()]
