"""The second derivative of convolutions, for all of torch in this process: penalties of gradients are made of little else.

Where the weight's derivative is wanted, torch's own formula makes a forward convolution of it, whose kernel is as large as the
feature map, and one for each group: in a step of R3GAN, whose layers have up to 768 groups, some 4,000. Here it is the gradient
of one convolution, as in the first derivative.
"""

import warnings

import torch


def double_backward(
    of_input: torch.Tensor | None,
    of_weight: torch.Tensor | None,
    of_bias: torch.Tensor | None,
    gradient: torch.Tensor,
    weight: torch.Tensor,
    x: torch.Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
    wanted: list[bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """The derivatives by `gradient`, by x and by weight of what `convolution_backward` makes of them.

    of_input, …: the derivatives by its results, as large as x, weight and bias; wanted: which of the three
    """
    geometry = stride, padding, dilation, transposed, output_padding, groups
    by_gradient = by_input = by_weight = None
    if wanted[0]:
        terms = [] if of_input is None else [torch.convolution(of_input, weight, None, *geometry)]
        terms += [] if of_weight is None else [torch.convolution(x, of_weight, None, *geometry)]
        terms += [] if of_bias is None else [of_bias.view(1, -1, *[1] * (gradient.dim() - 2)).expand_as(gradient)]
        by_gradient = sum(terms[1:], terms[0]) if terms else None
    if wanted[1] and of_weight is not None:
        by_input, _, _ = torch.ops.aten.convolution_backward(gradient, x, of_weight, None, *geometry, [True, False, False])
    if wanted[2] and of_input is not None:
        _, by_weight, _ = torch.ops.aten.convolution_backward(gradient, of_input, weight, None, *geometry, [False, True, False])
    return by_gradient, by_input, by_weight


_aten = torch.library.Library("aten", "IMPL")
with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "Warning only once for all operators")  # torch 2.11's, of a kernel that is replaced
    _aten.impl("_convolution_double_backward", double_backward, "CompositeImplicitAutograd")
