"""The grader: runs readers' notebooks, each in a process of its own, and says which exercises are right.

    find.py       which notebooks a folder holds, and whose they are
    supervise.py  starts one process a notebook, watches time, memory and disk, ends it (the instructor's side)
    worker.py     runs the cells, checks the exercises, writes down what it found (the reader's side)
    lockdown.py   what the system itself refuses to that process: limits, network, files
    guards.py     what Python refuses to it, in words
    results.py    what was found for an exercise and for a notebook
    report.py     as tables, CSV and JSON

What is fair. The exercises of a lesson are those of its checker module, one point each. They are found by name among what
the notebook's cells made, so that deleted check cells cost nothing. An exercise is checked right after the cell that
defines it, and once more after the last cell if it was not right then (it may use a helper that a later cell defines):
right at one of these moments is right. A second definition replaces the first. What dsv3_mini itself defines is no
answer. A cell that fails, or is stopped, does not stop the cells after it. If the process dies (its memory, its time,
a kill), what was checked before stays, and the rest is "not run", with the reason.

What is not promised. This is a guard rail for accidents and for idle mischief, not a sandbox. The reader's code and the
checks share a process: whoever is set on points and knows Python's inside can have them. Everything on the disk that the
instructor can read, a notebook can read; compiled code can change what lies in /dev/shm. Where the system has no Landlock
(Linux before 5.13, macOS, Windows), files outside are protected from Python's own functions only, not from compiled
code; where it grants no network namespace, the network likewise. On Windows there are no limits but those of the
watch: memory and time of the whole notebook. Each report says which protection it was. For notebooks of strangers, use
a container or a machine to throw away.
"""
