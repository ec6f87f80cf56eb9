"""Speed and memory of clawrl, each as a ratio or a bound measured in one run (`python -m jobs.bench`)."""
