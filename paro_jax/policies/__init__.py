"""Who keeps which blocks: pure functions that return a `BlockMask`.

A policy has no state and no registry; one of yours has the same rank as these. `plan.with_mask(policy(...))` brings a
mask to attention, `plan.mask() & policy(...)` and `plan.mask() | policy(...)` both: PARO with a dynamic mask, here in
every layer of a model, which hands over its q, k, v and its part of the plan, is

    def united(q, k, v, *, plan):
        mask = plan.mask() | sparge(q, k, plan=plan, topk=0.1)
        return masked_attention(q, k, v, mask, plan=plan)

    net(latents, timestep, text, plan=plan, attention_fn=united)

What differs by layer beyond the plan (tuned knobs, a random key, what was remembered) is the model's `carry`.

| policy | what decides | order |
|---|---|---|
| `dense`, `window` | the geometry | any |
| `top_blocks` | scores of yours | any |
| `sliding_tile` (STA), `radial`, `neighbours` | the geometry | brick, model order, any (Gilbert) |
| `multi_diagonal`, `vertical_stripe`, `skip` (Sparse-vDiT) | the geometry; `sparse_vdit` searches offline | any |
| `sparge` (SpargeAttn), `xattention` | q and k | the plan's |
| `sparse_videogen` | q, k and v | chosen: model order or "HWF" |
| `sparse_videogen2` | q and k | made: k-means, for `slot_attention` |

DiTFastAttn's window is `window`; what it shares between steps is `shared_attention`. What a mask skips need not be
lost: `compensated_attention` lets the means of skipped blocks speak for them.

In every mask text rows and columns are kept, the last partial block is counted and masked exactly, each row keeps at
least a block, and `density` is kept blocks over all blocks, text included. Static policies return keep [heads, nq, nk];
those that look at q and k return [B, heads, nq, nk], for `masked_attention`. Policies that a threshold ends differ in
the block that crosses it: SpargeAttn leaves it out, SVG2 and XAttention keep it.
"""

from paro_jax.policies._apply import masked_attention as masked_attention
from paro_jax.policies._apply import slot_attention as slot_attention
from paro_jax.policies._basic import at_density as at_density
from paro_jax.policies._basic import dense as dense
from paro_jax.policies._basic import top_blocks as top_blocks
from paro_jax.policies._basic import window as window
from paro_jax.policies._compensate import compensated_attention as compensated_attention
from paro_jax.policies._ditfast import Memory as Memory
from paro_jax.policies._ditfast import Share as Share
from paro_jax.policies._ditfast import greedy_sharing as greedy_sharing
from paro_jax.policies._ditfast import shared_attention as shared_attention
from paro_jax.policies._ditfast import sharing_loss as sharing_loss
from paro_jax.policies._geometry import neighbours as neighbours
from paro_jax.policies._geometry import radial as radial
from paro_jax.policies._geometry import sliding_tile as sliding_tile
from paro_jax.policies._sparge import SpargeTuning as SpargeTuning
from paro_jax.policies._sparge import sparge as sparge
from paro_jax.policies._sparge import sparge_pv_skip as sparge_pv_skip
from paro_jax.policies._sparge import tune_sparge as tune_sparge
from paro_jax.policies._svg import sparse_videogen as sparse_videogen
from paro_jax.policies._svg2 import Centroids as Centroids
from paro_jax.policies._svg2 import ContentOrder as ContentOrder
from paro_jax.policies._svg2 import sparse_videogen2 as sparse_videogen2
from paro_jax.policies._vdit import column_mass as column_mass
from paro_jax.policies._vdit import mask_errors as mask_errors
from paro_jax.policies._vdit import multi_diagonal as multi_diagonal
from paro_jax.policies._vdit import pick_masks as pick_masks
from paro_jax.policies._vdit import skip as skip
from paro_jax.policies._vdit import sparse_vdit as sparse_vdit
from paro_jax.policies._vdit import vertical_stripe as vertical_stripe
from paro_jax.policies._xattention import xattention as xattention
