import io

from lorainit.config.events import Metrics
from lorainit.config.results import write_csv

HEADER = (
    "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy,train_mean_token_accuracy,"
    "full_valid_loss,full_valid_mean_token_accuracy,learning_rate,epoch,tokens"
)


def test_csv_has_the_hosted_columns_and_empty_cells_for_what_is_missing():
    rows = [
        Metrics(step=1, total_steps=2, epoch=0.5, tokens=7, seconds=1, train_loss=1.5, train_mean_token_accuracy=0.25),
        Metrics(step=2, total_steps=2, epoch=1.0, tokens=9, seconds=2, train_loss=float("nan"), full_valid_loss=1e-7),
    ]
    stream = io.StringIO(newline="")
    write_csv((row.model_dump() for row in rows), stream)
    assert stream.getvalue() == f"{HEADER}\n1,1.5,0.25,,,0.25,,,,0.5,7\n2,,,,,,1e-07,,,1.0,9\n"
