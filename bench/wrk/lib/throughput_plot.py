"""Draws requests per second, as multiples of nginx's as a proxy, over object size."""

import plotting


def rates(rows, system, moves_every):
    """Sizes and requests per second."""
    found = [r for r in rows if "object_bytes" in r and (r["system"], r["moves_every"]) == (system, moves_every)]
    return {r["object_bytes"]: r["req_s"] for r in found}


def draw(rows, pyplot):
    """Plain connections on the left, TLS on the right."""
    figure, both = pyplot.subplots(1, 2, figsize=(10, 4), sharex=True)
    for axes, tls in zip(both, (False, True)):
        its = [r for r in rows if r["tls"] == tls]
        proxy = rates(its, "nginx", 0)
        for system, every in dict.fromkeys((r["system"], r["moves_every"]) for r in its if "object_bytes" in r):
            found = rates(its, system, every)
            label = f"{system}, every {every}" if every else system
            axes.plot(list(found), [found[size] / proxy[size] for size in found], marker=".", label=label)
        for r in its:
            if r.get("break_even_bytes"):
                axes.axvline(r["break_even_bytes"], color="grey", linestyle=":")
                axes.annotate(f"= {r['beside']}", (r["break_even_bytes"], 0), rotation=90, fontsize="x-small")
        axes.set(xscale="log", xlabel="object, bytes", ylabel="requests/s, of nginx's", ylim=(0, None), title="TLS" if tls else "plain")
        axes.legend(fontsize="x-small")
    return figure


if __name__ == "__main__":
    plotting.main("throughput", draw)
