"""Makes the tiny plan files of tests/test_import_official.py, as the method's authors write theirs. Needs torch.

    python tests/golden/make_official_plans.py        (written with torch 2.13.0)

Grid (5, 10, 13) with 70 tokens of text: 720 tokens, 12 blocks of 64, of which 2 hold text. 2 masks, 2 layers, 3 heads.
"""

from pathlib import Path

import torch

FOLDER = Path(__file__).parent / "official"
MASKS, LAYERS, HEADS, BLOCKS, TEXT_BLOCKS = 2, 2, 3, 12, 2


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    order = torch.tensor([[0, 1, 2], [3, 4, 5]])
    torch.save({"permute": order, "empty": torch.zeros(LAYERS, HEADS)}, FOLDER / "permute_plan.pth")
    flagged = torch.zeros(LAYERS, HEADS)
    flagged[1, 2] = 1
    torch.save({"permute": order.int(), "empty": flagged}, FOLDER / "permute_plan_empty.pth")
    torch.save({"permute": order + 1, "empty": torch.zeros(LAYERS, HEADS)}, FOLDER / "permute_plan_unknown.pth")

    # Sparse enough that every kept block shows: one block in 29.
    number = torch.arange(MASKS * LAYERS * HEADS * BLOCKS * BLOCKS).reshape(MASKS, LAYERS, HEADS, BLOCKS, BLOCKS)
    whole = (number * 5) % 29 == 0
    forced = whole.clone()
    for part in (forced[..., :TEXT_BLOCKS, :], forced[..., :TEXT_BLOCKS], forced[..., -1, :], forced[..., -1]):
        part[...] = True
    rate = forced.float().mean((-2, -1))
    torch.save({"sparse": forced, "dense_rate": rate}, FOLDER / "sparse_plan.pth")
    # The same mask as the authors' other scripts count it, in other dtypes; the first is a strided view.
    image = forced[..., TEXT_BLOCKS:, TEXT_BLOCKS:]
    torch.save({"sparse": image.to(torch.uint8), "dense_rate": rate}, FOLDER / "sparse_plan_image.pth")
    short = image[..., :-1, :-1].transpose(-1, -2).contiguous().transpose(-1, -2).float()
    torch.save({"sparse": short, "dense_rate": rate + 0.1}, FOLDER / "sparse_plan_short.pth")
    torch.save({"sparse": forced.to(torch.int8) * 2, "dense_rate": rate}, FOLDER / "sparse_plan_twos.pth")
    torch.save(forced, FOLDER / "kernel_sparse_plan.pth")
    torch.save({"sparse": forced[:, :1], "dense_rate": rate[:, :1]}, FOLDER / "sparse_plan_one_layer.pth")


if __name__ == "__main__":
    main()
