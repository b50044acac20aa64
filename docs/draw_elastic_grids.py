"""Draws docs/elastic_grids.png: the three grids of elastic_deform on the same displacements."""

from pathlib import Path

import matplotlib.pyplot as plt
import torch

from unet_fast import elastic_deform

SIDE, SIGMA, MARGIN = 257, 10.0, 64
GRIDS = {
    "interpolating": "interpolating: spline through the points",
    "approximating": "approximating: points are coefficients",
    "keys": "keys: cubic convolution",
}


def field(grid, displacement):
    """Displacements of all pixels, (2, SIDE, SIDE): of an image whose values are positions."""
    axis = torch.arange(SIDE + 2 * MARGIN).double()
    image = torch.stack(torch.meshgrid(axis, axis, indexing="ij"))[None]
    tile = {"output_shape": (SIDE, SIDE), "offset": torch.full((1, 2), float(MARGIN))}
    moved = elastic_deform(image, displacement[None], grid=grid, **tile)
    return (moved - elastic_deform(image, **tile))[0]


def main():
    """Writes the picture beside this file."""
    generator = torch.Generator().manual_seed(5)
    values = SIGMA * torch.randn(2, 5, 5, generator=generator).double()
    inner = values[:, 1:-1, 1:-1]
    figure, axes = plt.subplots(
        2, 3, figsize=(12, 7.6), layout="constrained", height_ratios=(3, 1.3)
    )
    pixel = torch.arange(SIDE).double()
    knots = torch.linspace(0, SIDE - 1, 3)
    for column, (grid, title) in zip(axes.T, GRIDS.items(), strict=True):
        u = field(grid, values if grid == "approximating" else inner)
        top, bottom = column
        for line in range(0, SIDE, 16):
            top.plot(pixel + u[1, line], line + u[0, line], color="0.6", linewidth=0.8)
            top.plot(line + u[1, :, line], pixel + u[0, :, line], color="0.6", linewidth=0.8)
        y, x = torch.meshgrid(knots, knots, indexing="ij")
        top.quiver(x, y, inner[1], inner[0], angles="xy", scale_units="xy", scale=1, color="C3")
        top.set(title=title, xticks=[], yticks=[], aspect="equal")
        top.set(xlim=(-30, SIDE + 30), ylim=(SIDE + 30, -30))
        bottom.plot(pixel, u[0, SIDE // 2], label="row displacement along the middle row")
        bottom.plot(knots, inner[0, 1], "o", color="C3", label="the grid's")
        bottom.set(xlabel="column, pixels", ylim=(-22, 22))
    axes[1, 0].set_ylabel("pixels")
    axes[1, 0].legend(fontsize="small", loc="upper right")
    figure.savefig(Path(__file__).parent / "elastic_grids.png", dpi=80)


if __name__ == "__main__":
    main()
