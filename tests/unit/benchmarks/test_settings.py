"""Environment and command of a run."""

from benchmarks.bench import parse_metrics
from benchmarks.run import _parser
from benchmarks.settings import environment


def test_what_the_caller_set_stays():
    """Somebody who measures with other threads may."""
    merged = environment({"OMP_NUM_THREADS": "1", "PATH": "/bin"})
    assert merged["OMP_NUM_THREADS"] == "1"
    assert merged["GOMP_SPINCOUNT"] == "5000"
    assert merged["PATH"] == "/bin"


def test_the_environment_is_settled_after_one_start():
    """The process starts itself again at most once."""
    once = environment({})
    assert environment(once) == once


def test_metrics_are_read_by_name_and_labels():
    """Prometheus' text format, comments left out."""
    text = '# HELP a b\nfedsea_steps_total 3.0\nfedsea_step_rows_total{kind="decode"} 48.0\n'
    assert parse_metrics(text) == {
        "fedsea_steps_total": 3.0,
        'fedsea_step_rows_total{kind="decode"}': 48.0,
    }


def test_options_have_defaults():
    """No option is needed."""
    options = _parser().parse_args([])
    assert (options.quick, options.only, options.no_save) == (False, None, False)
