"""Every method the field compares with, on one model, in one table (`paro eval`).

    subject = demo_subject(prompts=4, seeds=4, steps=8)
    table = evaluate(subject, out=Path("out/eval"), at=(1, 4, 6), edges=(0, 0.25, 0.5, 1))

A `Subject` is a model with prompts and a sampler; `METHODS` make a `Setting` of its attention from captured q, k, v and
a density; `evaluate` generates every case under each and compares with the dense generation from the same noise.
"""

from paro_jax.evaluation._demo import demo_subject as demo_subject
from paro_jax.evaluation._methods import METHODS as METHODS
from paro_jax.evaluation._methods import WIDTHS as WIDTHS
from paro_jax.evaluation._methods import Context as Context
from paro_jax.evaluation._methods import Method as Method
from paro_jax.evaluation._report import Table as Table
from paro_jax.evaluation._run import DENSITIES as DENSITIES
from paro_jax.evaluation._run import Extractors as Extractors
from paro_jax.evaluation._run import Row as Row
from paro_jax.evaluation._run import attention_level as attention_level
from paro_jax.evaluation._run import default_rows as default_rows
from paro_jax.evaluation._run import evaluate as evaluate
from paro_jax.evaluation._subject import Case as Case
from paro_jax.evaluation._subject import Made as Made
from paro_jax.evaluation._subject import Setting as Setting
from paro_jax.evaluation._subject import Subject as Subject
