"""Who computes, where: workers, devices, a cluster, and how long it will take; knows no rules and no plans."""
