"""The committed table of model classes: all tried, without a wrong result, and what comes here."""

import json

import pytest
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.model import model_table, tiny_classes

TABLE = json.loads(model_table.JSON.read_text())
ROWS = TABLE["classes"]
# One of each way: together, a pass a stream, whole texts, padding refused, refused altogether;
# and one that is made of several configs.
FEW = ["falcon_h1", "mixtral", "recurrent_gemma", "bart", "xlnet", "gemma3n"]


def words(row):
    return {name: cell.split(":")[0] for name, cell in row.items()}


def test_every_class_was_tried_and_no_result_is_wrong():
    assert not {
        kind: cell
        for kind, row in ROWS.items()
        for cell in row.values()
        if not cell.startswith(("exact", "padded:", "refused:", "yes", row["class"]))
    }


def test_the_page_is_that_of_the_table():
    assert model_table.PAGE.read_text() == model_table.render(TABLE)


def test_every_class_of_transformers_is_there():
    if transformers.__version__ != TABLE["transformers"]:
        pytest.skip(f"the table is of transformers {TABLE['transformers']}")
    assert {row["class"] for row in ROWS.values()} == set(
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    )


@pytest.mark.parametrize("kind", FEW)
def test_some_rows_come_out_again(kind):
    assert words(model_table.look(kind)) == words(ROWS[kind])


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in tiny_classes.kinds() if kind not in FEW])
def test_every_row_comes_out_again(kind):
    if transformers.__version__ != TABLE["transformers"]:
        pytest.skip(f"the table is of transformers {TABLE['transformers']}")
    assert words(model_table.look(kind)) == words(ROWS[kind])
