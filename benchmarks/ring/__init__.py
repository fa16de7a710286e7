"""Several machines that run one model: the same answers, and seconds a token beside what the disks allow."""
