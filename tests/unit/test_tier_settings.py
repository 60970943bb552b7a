"""Settings of the tiers that do not go together are refused at the start, with the remedy."""

import pytest

from gateway import app
from gateway.settings import SettingsError, load

BUCKETS = {"CWG_S3_BUCKET": "kv-1", "CWG_S3_PINS_BUCKET": "pins-1"}


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"CWG_S3_BUCKET": "kv-1"}, "needs two buckets: set s3_bucket .* and s3_pins_bucket"),
        ({"CWG_S3_PINS_BUCKET": "kv-1"}, "needs two buckets"),
        ({**BUCKETS, "CWG_S3_PINS_BUCKET": "kv-1"}, "both 'kv-1': give the pins another bucket"),
        ({**BUCKETS, "CWG_S3_ACCESS_KEY_ID": "k"}, "s3_access_key_id and s3_secret_access_key together"),
        ({**BUCKETS, "CWG_S3_SECRET_ACCESS_KEY": "k"}, "s3_access_key_id and s3_secret_access_key together"),
        ({"CWG_KV_REDIS_PREFIX": "a"}, "kv_redis_prefix is of LMCache's `valkey` adapter"),
        ({"CWG_KV_REDIS_CLUSTER": "true"}, "kv_redis_cluster is of LMCache's `valkey` adapter"),
    ],
)
def test_settings_that_do_not_go_together_stop_the_start(environment: dict[str, str], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        app.main(load(environment=environment))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("S3_BUCKET", "ab", "s3_bucket 'ab' is not the name of a bucket"),
        ("S3_PINS_BUCKET", "Not_a_Bucket", "s3_pins_bucket 'Not_a_Bucket' is not the name of a bucket"),
        ("S3_ENDPOINT", "s3:9000", "s3_endpoint 's3:9000' is not an http"),
        ("S3_ENDPOINT", "https://key:secret@s3", "s3_endpoint has a user name or password in a URL"),
        ("KV_REDIS_PREFIX", "a@b", "kv_redis_prefix has an @"),
        ("KV_REDIS_ADAPTER", "redis", "kv_redis_adapter must be 'resp' or 'valkey'"),
    ],
)
def test_wrong_value_is_refused_by_name(name: str, value: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        load(environment={f"CWG_{name}": value})


def test_secret_of_s3_is_not_shown() -> None:
    assert "very-secret" not in repr(load(environment={"CWG_S3_SECRET_ACCESS_KEY": "very-secret"}))
