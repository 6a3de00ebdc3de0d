"""What a training shows: a bar with figures on a terminal, lines elsewhere."""

from __future__ import annotations

import time
from typing import Self

from fedsea.cli import screen
from fedsea.client.trainer import Callback, StepReport

# Without a terminal there are about so many lines for the steps of a run.
_LINES = 20
# At least so often, in seconds, there is one.
_LINE_SECONDS = 30.0


class TrainingDisplay(Callback):
    """Shows steps, evaluations and messages; use it as a context manager.

    Attributes:
        first_loss: of step 1, if it was taken here.
    """

    def __init__(self) -> None:
        self.first_loss: float | None = None
        self._bar = screen.StatusBar("training")
        self._evaluation = ""
        self._last_line = (0, time.monotonic())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def on_start(self, step: int, steps: int) -> None:
        if step < steps:
            self._bar.show(step, steps, ())

    def on_step(self, report: StepReport) -> None:
        if report.step == 1:
            self.first_loss = report.loss
        figures = [f"loss {report.loss:.4f}{self._evaluation}"]
        if report.step < report.steps:
            figures.append(f"{screen.duration_text(report.eta_s)} left")
        up, down = screen.bytes_text(report.bytes_up), screen.bytes_text(report.bytes_down)
        figures += [f"{report.tokens_per_second:.0f} tokens/s", f"{up} up, {down} down"]
        self._bar.show(report.step, report.steps, figures)
        if not screen.err.is_terminal and self._is_line_due(report):
            screen.detail(f"step {report.step} of {report.steps}: {', '.join(figures)}")

    def on_evaluation(self, step: int, loss: float) -> None:
        self._evaluation = f", evaluation {loss:.4f}"
        if not screen.err.is_terminal:
            screen.detail(f"step {step}: evaluation {loss:.4f}")

    def on_message(self, text: str) -> None:
        screen.notice(text)

    def _is_line_due(self, report: StepReport) -> bool:
        step, at = self._last_line
        often = max(1, report.steps // _LINES)
        now = time.monotonic()
        ends = report.step in {1, report.steps}
        if not ends and report.step - step < often and now - at < _LINE_SECONDS:
            return False
        self._last_line = (report.step, now)
        return True
