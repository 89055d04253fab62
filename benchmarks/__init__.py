"""What watching costs: initlab and today's idioms against the same network unwatched, as ratios within one run.

    python -m benchmarks [GROUP ...] [--threads N ...] [--device cuda] [--quick] [--json FILE] [--compare FILE]
                         [--plot FILE] [--from FILE]

Without groups: a dozen questions and how cost grows, in some minutes; with groups: all that they measure.

From the figure down to the watch:

    __main__.py    the command line
    questions.py   the dozen that a user asks: what is measured without a group, printed first and drawn
    draw.py        rows -> one figure
    guard.py       what became worse since a file of results
    report.py      rows -> the table that is printed
    groups.py      the table of groups
        step.py  stack.py  backward.py  ensemble.py  startup.py  phase.py  memory.py  collect.py  sweep.py
        verdict_costs.py  growth.py  train.py  gpu.py
                       what is raced against what
    peers.py       how others watch a network, written as they write it
    bare.py        the same work unwatched: what everything is divided by
    folders.py     run folders as a sweep leaves them, made without running it
    subjects.py    initlab's side; the one file that knows how initlab is called
    child.py       fresh processes and what they take
    nets.py        the networks, their weights and batches
    race.py        contestants in rotated rounds -> ratios with quartiles
    rows.py        a result, its JSON, its bar
    machine.py     where it was measured
    scale.py       beside the groups: what many run folders cost, in sums and not in ratios
    sees.py        beside the groups: what each tool says of planted situations, which planted.py holds
    laws.py        beside the groups: how often the law of a tensor is recognized
    verdicts.py    beside the groups: what each tool says is wrong with networks, which faults.py holds
    verdict_peers.py   how each of them is asked

A benchmark is no test: nothing here runs in the test suite but the arithmetic and the agreement of the contestants.
initlab knows nothing of this package, and no wheel holds it.
"""
