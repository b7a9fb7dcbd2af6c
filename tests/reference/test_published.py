import tomllib
from pathlib import Path

import pytest

import reference

PUBLISHED = tomllib.loads((Path(reference.__file__).parent / "published.toml").read_text(encoding="utf-8"))


@pytest.mark.parametrize("table", PUBLISHED["tables"], ids=lambda table: f"{table['source']}-{table['benchmark']}")
def test_every_number_has_a_source_and_a_protocol(table: dict[str, object]) -> None:
    assert table["source"] in PUBLISHED["sources"]
    assert table["protocol"] in PUBLISHED["protocols"]
    methods = table["methods"]
    assert isinstance(methods, dict)
    for row in methods.values():
        assert 0 < row["acc"] < 100
        assert -100 < row.get("bwt", 0) <= 0


def test_the_two_accounts_of_became_are_kept_apart() -> None:
    tables = {t["source"]: t["methods"] for t in PUBLISHED["tables"] if t["source"] in ("became", "secondary")}
    assert tables["became"]["became-gpm"]["acc"] == 75.05
    assert tables["secondary"]["became"]["acc"] == 77.3
    assert tables["became"]["gpm"]["acc"] != tables["secondary"]["gpm"]["acc"]
