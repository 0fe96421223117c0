"""The quickstart by the modern recipe: better at text and longer sums in the same time, but not to be exported.

    python launch.py --experiment=quickstart_modern

What differs from quickstart is in `modern` of jaxchat/recipes.py, but for weight decay and for windows, which save
nothing in a context of 128 tokens. A step takes a little longer, so there are fewer. After pretraining, rates half as
high as those of the quickstart keep the facts that the model has read.
"""

import dataclasses

from jaxchat.cli.experiments import load_experiment
from jaxchat.recipes import modern

plain = load_experiment("quickstart")
recipe = modern(dataclasses.replace(plain, pretrain=dataclasses.replace(plain.pretrain, num_iterations=340)))
experiment = dataclasses.replace(
    recipe,
    model=dataclasses.replace(recipe.model, window_pattern=plain.model.window_pattern),
    optimizer=dataclasses.replace(recipe.optimizer, matrix_weight_decay=0.0),
    midtrain=dataclasses.replace(recipe.midtrain, lr_fraction=0.25),
    sft=dataclasses.replace(recipe.sft, lr_fraction=0.15),
    rl=dataclasses.replace(recipe.rl, lr_fraction=0.05),
)
