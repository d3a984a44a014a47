"""Progress of long calls: the two contracts, callbacks with (message, fraction) and callables that take a Progress."""

import time

SECONDS_BETWEEN_CALLS = 0.1


class Progress:
    """State of a long call, as a progress callable receives it.

    stage: 'check', 'quantize', 'verify' …; tensor: the one just finished, or None; n_done, n_total: tensors; bytes_done, bytes_total: of source data;
    fraction: 0..1, never falling; elapsed_s; eta_s: seconds left as estimated, or None; detail: one line about the finished tensor, or None.

    >>> import arrow_quant_v2 as aq
    >>> aq.Progress('quantize', None, 1, 4, 10, 40, 0.25, 0.1, 0.3, None).fraction
    0.25
    """

    __slots__ = ("stage", "tensor", "n_done", "n_total", "bytes_done", "bytes_total", "fraction", "elapsed_s", "eta_s", "detail")
    __module__ = "arrow_quant_v2"

    def __init__(self, stage, tensor, n_done, n_total, bytes_done, bytes_total, fraction, elapsed_s, eta_s, detail):
        self.stage, self.tensor, self.n_done, self.n_total = stage, tensor, n_done, n_total
        self.bytes_done, self.bytes_total, self.fraction = bytes_done, bytes_total, fraction
        self.elapsed_s, self.eta_s, self.detail = elapsed_s, eta_s, detail

    def __repr__(self):
        return f"<Progress {self.stage} {self.n_done}/{self.n_total} {self.fraction:.0%}>"


class Callback:
    """A caller's `progress_callback(message, fraction)`: an exception in it becomes a warning, except KeyboardInterrupt and the like.

    The object is the `tick` of a job: at most ten calls a second, each when at least one more layer is finished. `keep_going` may stop the job.
    """

    def __init__(self, callback, keep_going=None):
        if callback is not None and not callable(callback):
            raise TypeError(f"progress_callback must be callable or None, not {type(callback).__name__}")
        self.callback, self.keep_going = callback, keep_going
        self.n_told, self.next_call = 0, 0.0

    def tell(self, message, fraction):
        if self.callback is None:
            return
        try:
            self.callback(message, fraction)
        except Exception as error:  # noqa: BLE001
            warn(f"progress_callback raised {error!r}; the work goes on")

    def __call__(self, stage, tensor, n_done, n_total, bytes_done, bytes_total, fraction, elapsed_s, eta_s, detail):
        if self.keep_going is not None and not self.keep_going():
            return False
        now = time.monotonic()
        if n_done > self.n_told and now >= self.next_call and fraction < 1:
            self.n_told, self.next_call = n_done, now + SECONDS_BETWEEN_CALLS
            self.tell(f"Quantized {n_done} of {n_total} tensors" + (f": {tensor}" if tensor else ""), fraction)
        return True


def warn(text):
    """A RuntimeWarning at the caller's line; where warnings are errors it goes to the log, for it must not stop the work."""
    import sys
    import warnings

    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("arrow_quant_v2", "asyncio"):
        level, frame = level + 1, frame.f_back
    try:
        warnings.warn(text, RuntimeWarning, stacklevel=level)
    except Warning:
        from ._jobs import log

        log(30, text)


class Bar:
    """progress=True: a tqdm bar on a terminal, nothing elsewhere."""

    def __init__(self):
        self.bar = None
        import sys

        if sys.stderr is not None and sys.stderr.isatty():
            try:
                from importlib import import_module

                tqdm = import_module("tqdm").tqdm
            except ImportError:
                return
            self.bar = tqdm(total=100, unit="%", bar_format="{l_bar}{bar}| {elapsed}<{remaining}", leave=False)

    def __call__(self, progress):
        if self.bar is not None:
            self.bar.n = round(100 * progress.fraction, 1)
            self.bar.set_description_str(f"{progress.stage} {progress.n_done}/{progress.n_total}")

    def close(self):
        if self.bar is not None:
            self.bar.close()


class Watch:
    """The tick of a short function's job: hands a Progress to `progress`; False from it, or from `keep_going`, stops the job."""

    def __init__(self, progress, keep_going=None):
        if progress is not None and progress is not True and progress is not False and not callable(progress):
            raise TypeError(f"progress must be True, a callable or None, not {type(progress).__name__}")
        self.progress = Bar() if progress is True else progress or None
        self.keep_going = keep_going

    def __call__(self, *state):
        if self.keep_going is not None and not self.keep_going():
            return False
        return self.progress is None or self.progress(Progress(*state)) is not False

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if isinstance(self.progress, Bar):
            self.progress.close()
