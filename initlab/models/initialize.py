"""`init_`: a rule applied to a model of one's own, each parameter by its kind, with the gain that it needs."""

from typing import Any

from torch import nn

from initlab.errors import UsageError, check_value, library_call, show
from initlab.models.draw_weights import read_rule
from initlab.models.init_report import InitReport
from initlab.models.model_filler import RESIDUALS, ModelFiller
from initlab.models.symbolic_flow import refuse_unreadable
from initlab.models.weight_writer import restore_on_error
from initlab.nn.init import Rule


@library_call
def init_(
    model: nn.Module,
    rule: Any,
    x: Any = None,
    *,
    residual: str | None = None,
    seed: int | None = None,
    quiet: bool = False,
    **options: Any,
) -> InitReport:
    """Initialize a model of one's own in place, by a rule, and say what was done to each parameter.

    model: any nn.Module. rule: a name of `Rule`'s table such as "kaiming", a Rule, a name of torch.nn.init such as
    "xavier_uniform_", or a function that fills a tensor (outputs first). x: a batch, by which the flow of data is
    found, and which LSUV fits the weights to; without it the flow is read from the code. residual: "1/sqrt(2L)" divides
    the last layer of each residual branch by the root of their number (two in each of L Transformer blocks), "zero"
    sets it to 0, None leaves it; where that layer ends in a norm it is the norm's weight. seed: what all random numbers
    depend on, with the name of the parameter; None takes one from torch. quiet: print nothing. options: fields of the
    rule, such as `gain` and `mode`, or arguments of torch's function, such as `std`.

    Weights get the gain of the activation that follows them, 1 where none does. Gates of an LSTM or GRU, the
    projections of attention and the groups of a convolution are drawn each for itself. Norms become 1 and 0, biases 0
    (the forget gate's 1), embeddings N(0, 1). A weight that is computed, by weight_norm or another parametrization, is
    made the one that is wanted through `right_inverse`. What has no rule is left as it is, and said.
    Returned is what was printed, with `.frame`, and `.groups(lr)` for the learning rates of `mup`.
    Errors: an unknown rule or option; parameters without memory or shape; a rule that needs a batch; a function that
    fails. The model is then as it was before.

    >>> net = nn.Sequential(nn.Linear(20, 50), nn.ReLU(), nn.Linear(50, 10))
    >>> report = init_(net, "kaiming", seed=0)
    init_: kaiming
    0.weight  linear (50, 20); std 0.3079, gain 1.414; relu follows
    0.bias    bias (50,); all 0
    2.weight  linear (10, 50); std 0.1358, gain 1; the output follows
    2.bias    bias (10,); all 0
    """
    if not isinstance(model, nn.Module):
        raise UsageError(f"model={show(model)}: must be an nn.Module")
    if residual is not None and residual not in RESIDUALS:
        raise UsageError(f"residual={show(residual)}: must be None, {' or '.join(map(repr, RESIDUALS))}")
    refuse_unreadable(model, True)
    name, how = read_rule(rule, options)
    fits = isinstance(how, Rule) and how.attempts > 0
    if fits and x is None:
        raise UsageError(f"x: {name} scales weights by what the data make of them; give a batch, init_(model, rule, x)")
    number = None if seed is None else check_value("seed", seed)
    with restore_on_error(model):
        report = ModelFiller(model, name, how, x, number, residual).fill()
    if not quiet:
        print(report)
    return report
