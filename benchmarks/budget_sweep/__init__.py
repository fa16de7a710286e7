"""Budget sweep: latency and memory over budget and disk, with the roofline."""
