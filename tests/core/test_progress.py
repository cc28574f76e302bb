"""Progress of long calls: nothing unless it is asked for, few lines in a log, a terminal that is clean afterwards."""

import pytest
import torch
from torch import nn

import spectrim as st
from spectrim.core import progress
from spectrim.core.progress import progress_callback


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


BATCHES = [(torch.randn(16, 8), torch.arange(16) % 4) for _ in range(3)]
INPUTS = [inputs for inputs, _ in BATCHES]


def test_nothing_is_said_unless_it_is_asked_for(capfd: pytest.CaptureFixture[str]) -> None:
    seen: list[tuple[str, int, int]] = []
    with progress_callback(lambda *event: seen.append(event), progress=False) as report:
        report("fit", 1, 2)
    st.compress(network(), st.Budget(macs=0.7), example_inputs=INPUTS[0], data=INPUTS)
    assert seen == [("fit", 1, 2)]
    assert capfd.readouterr() == ("", "")


def test_long_calls_show_their_progress(capfd: pytest.CaptureFixture[str]) -> None:
    model, events = network(), []
    calibration = st.calibrate(model, INPUTS, progress=True)
    analysis = st.analyze(model, INPUTS[0], calibration=calibration)
    st.sensitivity(model, analysis, INPUTS, progress=True)
    st.compress(model, st.Rank(2), example_inputs=INPUTS[0], data=INPUTS, progress=True)
    st.finetune(model, BATCHES, epochs=2, progress=True, on_progress=lambda *event: events.append(event))
    written = capfd.readouterr()
    assert written.out == ""
    lines = [line.split("] ")[1].split(",")[0] for line in written.err.splitlines()]
    assert lines == ["0/3 calibrate", "0/2 0", "0/1 analyse", "1/6 epoch 1/2"]
    assert [event[1:] for event in events] == [(done, 6) for done in range(1, 7)]


def test_a_log_has_at_most_one_line_in_five_seconds(capfd, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 0.0, 3.0, 5.5, 6.0, 11.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(progress, "Progress", lambda *columns, **options: SilentBars())
    with progress_callback(progress=True) as report:
        for done in range(5):
            report("fit", done, 5)
    assert capfd.readouterr().err.splitlines() == [
        "[....................] 0/5 fit, 0 s",
        "[########............] 2/5 fit, 6 s",
        "[################....] 4/5 fit, 11 s",
    ]


class SilentBars:
    """In the place of rich's, which look at the clock as well."""

    def __enter__(self) -> "SilentBars":
        return self

    def __exit__(self, *error: object) -> None: ...

    def add_task(self, name: str, total: int | None) -> int:
        return 0


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_a_terminal_is_clean_after_an_error(capfd, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("TTY_INTERACTIVE", "1")
    monkeypatch.setenv("TERM", "xterm")

    def stop() -> None:
        with progress_callback(progress=True) as report:
            report("fit [bold]layer", 1, 2)
            raise error

    with pytest.raises(error):
        stop()
    written = capfd.readouterr()
    assert written.out == ""
    assert "fit [bold]layer" in written.err
    assert written.err.endswith("\x1b[2K")  # the line is erased
    assert written.err.rindex("\x1b[?25h") > written.err.rindex("\x1b[?25l")  # and the cursor is back
