"""`python -m inference slides --table`: the objects as a Parquet file that tables of cells are made from."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from inference.checksums import ensemble_id
from inference.errors import UserError
from inference.manifest import load_manifest
from test.support import detection_files as files
from test.support.commands import rows_of
from test.support.commands import slides as run
from test.support.miniature import make_ensemble
from test.support.pyramids import FIGURES, write_slide

PLACES = list(FIGURES)


def test_the_table_is_the_csv_with_numbers_and_micrometres(drawn, miniature, tmp_path) -> None:
    write_slide(tmp_path / "a.tif", [drawn])
    write_slide(tmp_path / "b.tif", [drawn], 0.5)
    inputs = [
        files.qupath(tmp_path / "a.geojson", PLACES),
        files.write_json(tmp_path / "b.geojson", files.features(PLACES[:2], "=Mitosis")),
    ]
    table, csv = tmp_path / "cells.parquet", tmp_path / "cells.csv"
    assert run(miniature, *inputs, "--table", table, "--csv", csv) == 0
    found, rows, manifest = pq.read_table(table), rows_of(csv), load_manifest(miniature)
    assert [(row["x"], row["y"]) for row in found.to_pylist()] == [*PLACES, *PLACES[:2]]
    for row, text in zip(found.to_pylist(), rows, strict=True):
        mpp = {"a.tif": 0.25, "b.tif": 0.5}[row["slide"]]
        assert (row.pop("x_um"), row.pop("y_um")) == pytest.approx((row["x"] * mpp, row["y"] * mpp))
        assert row.keys() == text.keys()
        for name, value in row.items():
            same = float(text[name]) if isinstance(value, float) else text[name].lstrip("'")
            assert value == same, name
    assert found["detected_as"][-1].as_py() == "=Mitosis"  # no spreadsheet reads this: it is as the file has it
    assert not any(column.null_count for column in found.columns)
    said = json.loads(found.schema.metadata[b"atypical_mitosis"])
    assert said == {"name": manifest.name, "id": ensemble_id(manifest), "threshold": manifest.threshold}
    before = table.read_bytes()
    assert run(miniature, *inputs, "--table", table) == 0 and table.read_bytes() == before


def test_a_slide_without_figures_adds_no_row_but_the_columns_stay(slide, tmp_path) -> None:
    make_ensemble(tmp_path, folds=3)
    (tmp_path / "empty.geojson").write_text('{"type": "FeatureCollection", "features": []}')
    one = files.qupath(tmp_path / "one.geojson", PLACES[:1])
    assert run(tmp_path, one, tmp_path / "empty.geojson", "--slide", slide, "--table", tmp_path / "t.parquet") == 0
    names = pq.read_table(tmp_path / "t.parquet").column_names
    assert [name for name in names if name.startswith("fold_")] == ["fold_0", "fold_1", "fold_2"]


def test_a_table_of_somebody_else_is_kept(slide, miniature, tmp_path) -> None:
    detections, out = files.qupath(tmp_path / "a.geojson", PLACES), tmp_path / "cells.parquet"
    assert run(miniature, detections, "--slide", slide, "--table", out) == 0
    found = pq.read_table(out)
    for other in (found.append_column("mine", pa.array(["me"] * 3)), found.replace_schema_metadata(None)):
        pq.write_table(other, out)
        before = out.read_bytes()
        with pytest.raises(UserError, match="holds something else"):
            run(miniature, detections, "--slide", slide, "--table", out)
        assert out.read_bytes() == before
    for damaged in (b"my notes\n", b"PAR1" + b"\xff" * 64 + b"\x10\0\0\0PAR1"):
        out.write_bytes(damaged)
        with pytest.raises(UserError, match="holds something else"):
            run(miniature, detections, "--slide", slide, "--table", out)


def test_the_pages_snippets_take_the_table(slide, miniature, tmp_path, monkeypatch) -> None:
    for name in ("anndata", "spatialdata"):
        pytest.importorskip(name, reason="in none of the locks; docs/qupath.md says with which versions it was run")
    detections = files.qupath(tmp_path / "a.geojson", PLACES)
    assert run(miniature, detections, "--slide", slide, "--table", tmp_path / "cells.parquet") == 0
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[2] / "docs" / "qupath.md").read_text()
    made = dict[str, Any]()
    for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(code, made)
    in_um = [(x * 0.25, y * 0.25) for x, y in PLACES]
    assert made["table"].obsm["spatial"].tolist() == [pytest.approx(place) for place in in_um]
    assert {"p_atypical", "spread"} <= set(made["table"].var_names)
    assert made["spatial"].points["mitoses"][["x", "y"]].compute().to_numpy().tolist() == [
        pytest.approx(place) for place in in_um
    ]
