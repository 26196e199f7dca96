"""Raw samples to a prepared dataset on disk: each checked, repaired where there is one right repair, and written once.

In: what `readers` give (`prepare`, `rows`). Out: a folder of Arrow files with `record.json` (`folder`, `record`), the statistics of
its features, and its faults in words (`faults`, `summary`).
"""
