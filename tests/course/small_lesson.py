"""A whole lesson in a page, for tests: it keeps every rule, and each test breaks one."""

SOURCE = '''# ---
# jupyter:
#   jupytext:
#     text_representation:
#       format_name: percent
#   dsv3:
#     title: Doubling
#     minutes: 5
#     after: []
#     builds: twice a number
#     tracks: [half-day, two-days, term]
# ---

# %% [markdown] tags=["why"]
# # 90 · Doubling

# %%
from dsv3_mini.course.checks.framework import Case, Exercise, Mistake


class check:
    double = Exercise("double", lambda x: 2 * x, [Case("three", lambda g: (3,))], [Mistake(lambda x: x, "nothing happened")])
    halve = Exercise("halve", lambda x: x / 2, [Case("three", lambda g: (3,))])
    treble = Exercise("treble", lambda x: 3 * x, [Case("three", lambda g: (3,))])

# %% [markdown] tags=["paper"]
# The paper.

# %% [markdown] tags=["naive"]
# The naive way.

# %% [markdown] tags=["exercise"]
# ### Exercise 1 · Twice
# ●○○ · 2 minutes
#
# <details><summary>Hint</summary>Add.</details>

# %%
def double(x: float) -> float:
    """Twice x."""
    ### BEGIN SOLUTION: return twice x
    y = x + x
    return y
    ### END SOLUTION

# %%
check.double(double)

# %% [markdown] tags=["exercise"]
# ### Exercise 2 · Half
# ●●○ · 3 minutes
#
# <details><summary>Hint</summary>Divide.</details>

# %%
def halve(x: float) -> float:
    ### BEGIN SOLUTION: return half of x
    return x / 2
    ### END SOLUTION

# %%
check.halve(halve)

# %% [markdown] tags=["package"]
# The package's own.

# %% [markdown] tags=["experiment"]
# The experiment.

# %% tags=["track:term"]
print("only in the term")

# %% [markdown] tags=["interactive"]
# A widget.

# %%
import ipywidgets
from matplotlib.figure import Figure

from dsv3_mini.viz.widgets.explorer import Explorer


def draw(n: int) -> Figure:
    figure = Figure(figsize=(2, 1))
    figure.subplots().plot(range(n))
    return figure

# %%
explorer = Explorer(draw, "a line", n=ipywidgets.IntSlider(3, 2, 9))
explorer

# %% [markdown] tags=["bug"]
# ### Find the bug · Three times
# ●○○ · 2 minutes
#
# <details><summary>Hint</summary>Look.</details>

# %%
def treble(x: float) -> float:
    ### BEGIN SOLUTION: return three times x
    return 3 * x
    ### END SOLUTION

# %%
check.treble(treble)

# %% [markdown] tags=["at-671b"]
# At 671B.

# %% [markdown] tags=["recap"]
# Recap.

# %% [markdown] tags=["next"]
# Next.
'''
