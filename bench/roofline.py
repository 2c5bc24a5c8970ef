# SPDX-License-Identifier: MIT
"""The roofline plot of a bench run, as SVG text: rates over FLOPs a byte, both logarithmic.

Lines are the ceilings measured in the run: reading memory (rising), and arithmetic in registers (level).
A point is a row: filled ours, hollow the peer's.
"""

import math

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 860, 560, 70, 170, 40, 50
COLOURS = {"bf16": "#1f5fa8", "fp16": "#b3541e", "fp32": "#3a7d44", "fp8": "#7a3b8f"}
LEVELS = {
    "amx_bf16": "tiles, bf16",
    "dp_bf16": "dot products, bf16",
    "fma_fp32": "multiply-adds, fp32",
}


def plot(title: str, rates: dict[str, float], rows: list[dict]) -> str:
    rows = [row for row in rows if row["kind"] != "call" and row["bytes_per_second"]]
    spots = [(row["flops_per_second"] / row["bytes_per_second"], row) for row in rows]
    x_low, x_high = 1.0, 10 ** math.ceil(math.log10(max([x for x, _ in spots], default=1000) * 1.01))
    least = min([row["flops_per_second"] * min(1, row["ratio"] ** -1) for row in rows], default=1e9)
    y_low = 10 ** math.floor(math.log10(least))
    y_high = 1.5 * max([rates.get(name, 0) for name in LEVELS] + [1e12])

    def x_at(x):
        return LEFT + (WIDTH - LEFT - RIGHT) * math.log(x / x_low) / math.log(x_high / x_low)

    def y_at(y):
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * math.log(y / y_low) / math.log(y_high / y_low)

    def line(x0, y0, x1, y1, style):
        return f'<line x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}" {style}/>'

    def text(x, y, words, more=""):
        return f'<text x="{x:.1f}" y="{y:.1f}" {more}>{words}</text>'

    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" '
        'font-family="sans-serif" font-size="11">',
        '<rect width="100%" height="100%" fill="white"/>',
        text(LEFT, 22, title, 'font-size="14"'),
        text((LEFT + right) / 2, HEIGHT - 12, "FLOPs a byte of q, k, v and out", 'text-anchor="middle"'),
    ]
    for power in range(round(math.log10(x_high)) + 1):
        x = x_at(10**power)
        out += [
            line(x, TOP, x, bottom, 'stroke="#ddd"'),
            text(x, bottom + 16, f"{10**power}", 'text-anchor="middle"'),
        ]
    for power in range(round(math.log10(y_low)), math.floor(math.log10(y_high)) + 1):
        y = y_at(10**power)
        name = f"{10**power / 1e12:g} TFLOP/s" if power >= 12 else f"{10**power / 1e9:g} GFLOP/s"
        out += [line(LEFT, y, right, y, 'stroke="#ddd"'), text(4, y + 4, name)]

    top = max((rates.get(name, 0) for name in LEVELS), default=0)
    if "read" in rates and top:
        meet, start = top / rates["read"], max(x_low, y_low / rates["read"])
        out.append(line(x_at(start), y_at(start * rates["read"]), x_at(meet), y_at(top), 'stroke="black"'))
        turn = x_at(start * 1.3), y_at(start * 1.3 * rates["read"]) - 6
        words = f"memory, {rates['read'] / 1e9:.0f} GB/s"
        slope = math.degrees(math.atan2(y_at(top) - y_at(start * rates["read"]), x_at(meet) - x_at(start)))
        out.append(text(*turn, words, f'transform="rotate({slope:.1f} {turn[0]:.1f} {turn[1]:.1f})"'))
    for name, words in LEVELS.items():
        if name in rates:
            start = x_at(max(x_low, rates[name] / rates.get("read", math.inf) if "read" in rates else x_low))
            y = y_at(rates[name])
            label = f"{words}: {rates[name] / 1e12:.2f} TFLOP/s"
            out += [line(start, y, right, y, 'stroke="black"'), text(right + 4, y + 4, label)]

    for x, row in spots:
        colour, rate = COLOURS.get(row["dtype"], "black"), row["flops_per_second"]
        words = f"{row['kind']} {row['shape']} {row['dtype']}: {rate / 1e9:.0f} GFLOP/s".replace("'", "")
        for y, fill in ((rate / row["ratio"], "white"), (rate, colour)):
            out.append(
                f'<circle cx="{x_at(x):.1f}" cy="{y_at(y):.1f}" r="4" fill="{fill}" stroke="{colour}">'
                f"<title>{words}</title></circle>"
            )
    for i, (dtype, colour) in enumerate(COLOURS.items()):
        y = bottom - 16 * (len(COLOURS) - i)
        out += [f'<circle cx="{right + 12}" cy="{y}" r="4" fill="{colour}"/>', text(right + 22, y + 4, dtype)]
    out += [text(right + 8, bottom, "hollow: the peer"), "</svg>"]
    return "\n".join(out) + "\n"
