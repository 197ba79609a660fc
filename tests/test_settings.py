from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from tidegate.errors import SettingsError
from tidegate.settings import Settings, read_settings


def test_without_any_variable_the_defaults_hold() -> None:
    settings = read_settings({})

    assert settings == Settings()
    assert settings.host == "127.0.0.1"
    assert settings.max_body_bytes == 2 * 1024 * 1024
    assert settings.policy == "balanced"
    assert settings.guard == "edge"
    assert settings.upstream_url is None
    assert settings.upstream_key is None


def test_the_environment_is_read_with_its_prefix_and_other_variables_are_left_alone() -> None:
    settings = read_settings({"TIDEGATE_PORT": "9000", "PORT": "1", "TIDEGATE_GUARD_TIMEOUT": "1.5", "HOME": "/"})
    tenants = read_settings({"TIDEGATE_JUDGE_SYSTEM": "true"})

    assert settings.port == 9000
    assert settings.guard_timeout == 1.5
    assert (settings.judge_system, tenants.judge_system) == (False, True)


def test_a_keyword_goes_before_the_environment_and_none_means_not_given() -> None:
    environment = {"TIDEGATE_PORT": "9000", "TIDEGATE_POLICY": "strict"}

    settings = read_settings(environment, port=9001, policy=None)

    assert (settings.port, settings.policy) == (9001, "strict")


def test_the_process_environment_is_read_when_none_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIDEGATE_POLICY", "loose")

    assert read_settings().policy == "loose"


def test_a_setting_is_called_what_it_was_given_as(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("k")
    environment = {"TIDEGATE_UPSTREAM_KEY_FILE": str(tmp_path / "key"), "TIDEGATE_PORT": "1", "TIDEGATE_HOST": "::1"}

    settings = read_settings(environment, port=2)

    called = [settings.called(name) for name in ("upstream_key", "host", "port", "guard")]
    assert called == ["TIDEGATE_UPSTREAM_KEY_FILE", "TIDEGATE_HOST", "port", "TIDEGATE_GUARD"]


def test_a_secret_that_cannot_be_used_is_said_with_the_name_of_its_file(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("two\nlines")
    with pytest.raises(SettingsError) as caught:
        read_settings({"TIDEGATE_UPSTREAM_KEY_FILE": str(tmp_path / "key")})

    assert caught.value.where == "TIDEGATE_UPSTREAM_KEY_FILE"


@pytest.mark.parametrize(
    ("variable", "suggestion"),
    [
        ("TIDEGATE_PROT", "TIDEGATE_PORT"),
        ("TIDEGATE_UPSTREAM_URI", "TIDEGATE_UPSTREAM_URL"),
        ("TIDEGATE_UPSTREAM_KEYFILE", "TIDEGATE_UPSTREAM_KEY_FILE"),
        ("TIDEGATE_POLICY_FILE", "TIDEGATE_POLICY"),
    ],
)
def test_a_mistyped_variable_is_an_error_that_names_the_nearest(variable: str, suggestion: str) -> None:
    with pytest.raises(SettingsError, match=f"did you mean {suggestion}") as caught:
        read_settings({variable: "1"})

    assert caught.value.where == variable


def test_a_variable_like_no_other_lists_what_is_known() -> None:
    with pytest.raises(SettingsError, match=r"known: TIDEGATE_ACCESS_LOG, .*TIDEGATE_CLIENT_TIMEOUT"):
        read_settings({"TIDEGATE_XYZZY": "1"})


def test_an_unknown_keyword_is_an_error() -> None:
    with pytest.raises(SettingsError, match="did you mean port"):
        read_settings({}, prot=1)


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("TIDEGATE_PORT", "eighty"),
        ("TIDEGATE_PORT", "65536"),
        ("TIDEGATE_PORT", "-1"),
        ("TIDEGATE_HOST", ""),
        ("TIDEGATE_MAX_BODY_BYTES", "12"),
        ("TIDEGATE_GUARD_TIMEOUT", "0"),
        ("TIDEGATE_GUARD_TIMEOUT", "nan"),
        ("TIDEGATE_GUARD_TIMEOUT", "inf"),
        ("TIDEGATE_LOG_LEVEL", "loud"),
        ("TIDEGATE_THROTTLE_FACTOR", "0"),
        ("TIDEGATE_THROTTLE_FACTOR", "1.5"),
        ("TIDEGATE_THROTTLE_SECONDS", "0"),
    ],
)
def test_a_value_that_cannot_be_used_is_an_error_that_shows_it(variable: str, value: str) -> None:
    with pytest.raises(SettingsError) as caught:
        read_settings({variable: value})

    assert caught.value.where == variable
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize(
    "url",
    ["localhost:8000", "ftp://example.org", "http://", "http://[::1", "http://a:b/", "http://h/v1?x=1", "http://h/#f"],
)
def test_an_upstream_that_is_not_a_web_address_is_an_error(url: str) -> None:
    with pytest.raises(SettingsError) as caught:
        read_settings({"TIDEGATE_UPSTREAM_URL": url})

    assert caught.value.where == "TIDEGATE_UPSTREAM_URL"


def test_a_password_in_the_upstream_url_is_refused_and_not_repeated() -> None:
    with pytest.raises(SettingsError, match="TIDEGATE_UPSTREAM_KEY") as caught:
        read_settings({"TIDEGATE_UPSTREAM_URL": "http://name:hunter2@example.org/v1"})

    assert "hunter2" not in str(caught.value)


def test_a_trailing_slash_of_the_upstream_is_dropped_and_an_empty_variable_means_none() -> None:
    assert read_settings({"TIDEGATE_UPSTREAM_URL": "http://h:1/v1/"}).upstream_url == "http://h:1/v1"
    assert read_settings({"TIDEGATE_UPSTREAM_URL": "", "TIDEGATE_UPSTREAM_KEY": ""}) == Settings()


def test_no_secret_is_shown_in_a_repr() -> None:
    settings = read_settings(
        {"TIDEGATE_UPSTREAM_KEY": "sk-secret", "TIDEGATE_DATABASE_URL": "postgresql://u:hunter2@db/x"}
    )

    shown = repr(settings) + str(settings)
    assert "sk-secret" not in shown
    assert "hunter2" not in shown
    assert settings.upstream_key is not None
    assert settings.upstream_key.get_secret_value() == "sk-secret"


def test_a_secret_that_cannot_be_a_header_is_an_error_that_does_not_show_it() -> None:
    with pytest.raises(SettingsError, match="line break") as caught:
        read_settings({"TIDEGATE_UPSTREAM_KEY": "sk-secret\nX-Evil: 1"})

    assert "sk-secret" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


def test_the_secret_may_come_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("sk-file\n", encoding="utf-8")

    settings = read_settings({"TIDEGATE_UPSTREAM_KEY_FILE": str(file)})

    assert settings.upstream_key is not None
    assert settings.upstream_key.get_secret_value() == "sk-file"


def test_a_secret_file_that_is_missing_or_given_twice_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="cannot read the file"):
        read_settings({"TIDEGATE_UPSTREAM_KEY_FILE": str(tmp_path / "none")})
    with pytest.raises(SettingsError, match="not both"):
        read_settings({"TIDEGATE_UPSTREAM_KEY_FILE": "x", "TIDEGATE_UPSTREAM_KEY": "y"})


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        read_settings({}).port = 1  # type: ignore[misc]


def test_the_store_is_set_from_the_environment_and_its_secrets_from_files(tmp_path: Path) -> None:
    url, key = tmp_path / "url", tmp_path / "key"
    url.write_text("postgresql://u:hunter2@db/x\n", encoding="utf-8")
    key.write_text("0f" * 32 + "\n", encoding="utf-8")

    settings = read_settings(
        {
            "TIDEGATE_DATABASE_URL_FILE": str(url),
            "TIDEGATE_FINGERPRINT_KEY_FILE": str(key),
            "TIDEGATE_SPOOL": "/var/spool/tidegate",
            "TIDEGATE_SPOOL_BYTES": "0",
            "TIDEGATE_KEEP_DAYS": "90",
        }
    )

    assert settings.database_url == "postgresql://u:hunter2@db/x"
    assert settings.fingerprint_key is not None
    assert settings.fingerprint_key.get_secret_value() == "0f" * 32
    assert (settings.spool, settings.spool_bytes, settings.keep_days) == (Path("/var/spool/tidegate"), 0, 90)
    assert "hunter2" not in repr(settings)
    assert "0f0f" not in repr(settings)
    empty = {"TIDEGATE_SPOOL": "", "TIDEGATE_KEEP_DAYS": "", "TIDEGATE_FINGERPRINT_KEY": ""}
    assert read_settings(empty) == Settings()


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("TIDEGATE_FINGERPRINT_KEY", "hunter2"),
        ("TIDEGATE_FINGERPRINT_KEY", "0f" * 31),
        ("TIDEGATE_SPOOL_BYTES", "-1"),
        ("TIDEGATE_KEEP_DAYS", "0"),
    ],
)
def test_a_setting_of_the_store_that_cannot_be_used_is_named(variable: str, value: str) -> None:
    with pytest.raises(SettingsError, match=variable) as caught:
        read_settings({variable: value})

    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "localhost", "LOCALHOST", "::1", "[::1]"])
def test_on_this_machine_everybody_is_let_in_unless_something_else_is_said(host: str) -> None:
    assert read_settings({}, host=host).check_entrance() == "none"
    assert read_settings({"TIDEGATE_AUTH": "keys"}, host=host).check_entrance() == "keys"


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.7", "gate.example.com"])
def test_where_others_can_come_it_has_to_be_said_who_is_let_in(host: str) -> None:
    with pytest.raises(SettingsError, match="TIDEGATE_AUTH: others can reach") as caught:
        read_settings({}, host=host).check_entrance()
    assert "keys" in caught.value.message
    for chosen in ("none", "keys"):
        assert read_settings({"TIDEGATE_AUTH": chosen}, host=host).check_entrance() == chosen


def test_lists_and_pairs_are_written_with_commas() -> None:
    settings = read_settings(
        {
            "TIDEGATE_OPEN_DOORS": "metrics, console",
            "TIDEGATE_ALLOWED_HOSTS": "a.example.com,*.b.example.com",
            "TIDEGATE_ADAPTERS": "bank=adapters/bank, school=adapters/s",
            "TIDEGATE_TRUSTED_FIELDS": "timings, x_groq",
        }
    )

    assert settings.open_doors == ("metrics", "console")
    assert settings.allowed_hosts == ("a.example.com", "*.b.example.com")
    assert settings.trusted_fields == ("timings", "x_groq")
    assert settings.adapters == {"bank": Path("adapters/bank"), "school": Path("adapters/s")}


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("OPEN_DOORS", "metrics,chat", "expected metrics, console"),
        ("ADAPTERS", "bank", "as bank="),
        ("TRUSTED_FIELDS", "a name", "expected names of fields"),
        ("TLS_CERT", "/no/such/file", "there is no such file"),
        ("AUTH", "maybe", "'none' or 'keys'"),
        ("TENANT_PER_MINUTE", "0", "greater than or equal to 1"),
    ],
)
def test_what_cannot_be_used_for_the_entrance_is_said(variable: str, value: str, said: str) -> None:
    with pytest.raises(SettingsError, match=said) as caught:
        read_settings({f"TIDEGATE_{variable}": value})

    assert caught.value.where == f"TIDEGATE_{variable}"


def test_settings_of_the_entrance_that_belong_together_are_together(tmp_path: Path) -> None:
    file = tmp_path / "key.pem"
    file.touch()
    with pytest.raises(SettingsError, match="TIDEGATE_TLS_CERT"):
        read_settings({"TIDEGATE_TLS_KEY": str(file)}).check_entrance()
    with pytest.raises(SettingsError, match="TIDEGATE_TENANT_PER_MINUTE"):
        read_settings({"TIDEGATE_TENANT_BURST": "5"}).check_entrance()


def test_the_address_of_redis_is_shown_nowhere_and_may_come_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "url"
    file.write_text("redis://:plumtree@127.0.0.1/0\n", encoding="utf-8")
    settings = read_settings({"TIDEGATE_REDIS_URL_FILE": str(file)})

    assert settings.redis_url == "redis://:plumtree@127.0.0.1/0"
    assert "plumtree" not in repr(settings)
