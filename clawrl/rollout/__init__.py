"""From turns to samples: the collector (actor) judges turns, `samples` turns judgements into training targets."""
