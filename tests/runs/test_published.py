"""The published numbers: each with source and protocol, and found wherever the package is installed."""

import pytest

from adapters.runs.published import PUBLISHED, published_tables


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


def test_the_tables_of_a_benchmark_are_those_of_the_same_tasks() -> None:
    found = published_tables("split-cifar100", 20)
    assert [table.methods["nscl"].acc for table in found] == [75.95]
    assert (found[0].methods["nscl"].bwt, found[0].methods["nscl"].forgetting) == (-3.66, None)
    assert found[0].source.startswith("Adam-NSCL (Wang, CVPR 2021)")
    assert "80 epochs" in found[0].protocol
    assert len(published_tables("split-cifar100", 10)) == 4
    assert published_tables("split-mnist", 5) == []
