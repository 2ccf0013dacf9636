"""How a candidate is judged on a case: runs, expectations, checks, gates and words."""
