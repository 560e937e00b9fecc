"""Calibration: from samples of a model's attention to an `AttentionPlan`. Not imported at inference.

`make_plan` decides (`make_plans`: for several densities at once); `LiveSamples` and `capture` record samples;
`block_mass`, `incoherence` and `attention_map` are the statistics and pictures of one attention call; `import_official`
reads the plan files of the method's authors.
"""

from calibrate._capture import LiveSamples as LiveSamples
from calibrate._capture import Sample as Sample
from calibrate._capture import capture as capture
from calibrate._import_official import import_official as import_official
from calibrate._incoherence import incoherence as incoherence
from calibrate._make_plan import make_plan as make_plan
from calibrate._make_plan import make_plans as make_plans
from calibrate._mass import attention_map as attention_map
from calibrate._mass import block_mass as block_mass
from calibrate._report import Report as Report
from calibrate._score import ParoMetric as ParoMetric
