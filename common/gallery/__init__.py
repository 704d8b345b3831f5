"""Tables, pictures and a page of all runs below a directory, for collect_results.py.

`files` reads what anybody may have written, `runs` makes Runs of it, `key_metrics` knows the main numbers of each script;
`tables`, `pictures` and `page` show them. A run that cannot be read or shown is a broken one, and costs no other run.
"""
