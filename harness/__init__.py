"""How we decide: cases, inputs, judge, localise, replay, golden dumps, command and pytest plugin."""
