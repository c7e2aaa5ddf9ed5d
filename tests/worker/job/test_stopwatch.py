"""Where a run's time goes, with a clock that is told."""

from lorainit.config.events import Event, Message, Metrics, Stage
from worker.job.stopwatch import Stopwatch


class Clock:
    def __init__(self) -> None:
        self.at = 100.0

    def __call__(self) -> float:
        return self.at


def played(*story: tuple[float, Event]) -> Stopwatch:
    clock = Clock()
    watch = Stopwatch(clock)
    for at, event in story:
        clock.at = 100.0 + at
        watch.add(event)
    return watch


def stage(name: str) -> Stage:
    return Stage.model_validate({"stage": name, "message": ""})


def step(number: int, loss: float | None = 1.0) -> Metrics:
    return Metrics(step=number, total_steps=9, epoch=0, tokens=1, seconds=1, train_loss=loss)


def test_starting_ends_with_the_childs_first_word() -> None:
    watch = played((3.0, Message(message="This machine")), (3.5, stage("loading")), (5.0, stage("initializing")))
    assert watch.seconds == {"starting": 3.0, "loading": 2.0, "initializing": 0.0}


def test_a_stage_that_comes_again_goes_on_counting() -> None:
    watch = played(
        (1.0, stage("training")), (4.0, stage("evaluating")), (5.0, stage("training")), (7.0, stage("exporting"))
    )
    assert watch.seconds == {"starting": 1.0, "training": 5.0, "evaluating": 1.0, "exporting": 0.0}


def test_stages_together_are_the_time_since_the_claim() -> None:
    watch = played((1.25, stage("loading")), (2.5, stage("training")), (9.0, step(1)))
    assert sum(watch.seconds.values()) == 9.0


def test_the_first_step_is_the_first_with_a_training_loss() -> None:
    assert played((4.0, stage("training"))).to_first_step is None
    watch = played((4.0, step(0, None)), (6.0, step(1)), (8.0, step(2)))
    assert watch.to_first_step == 6.0
