//! Drawings as SVG: bars of ratios, curves of a cost against a size.
//!
//! Called by the figures and the command. SVG is text, so a drawing may be committed; it follows the reader's light or dark
//! scheme. Two kinds of drawing of a few elements each do not need a plotting library.

use super::report::{Goal, Line, number};

/// A curve.
#[derive(Clone, Debug)]
pub struct Series {
    /// In the legend.
    pub name: String,
    /// x (above zero) and y.
    pub points: Vec<(f64, f64)>,
}

const WIDTH: f64 = 860.0;
/// A drawing has a ground of its own: whether the page around it is dark is not always what the reader's system says.
const STYLE: &str = "<style>text{font:13px sans-serif;fill:#24292f}.t{font-weight:bold;font-size:15px}.h{font-weight:bold}.s{font-size:11px;fill:#57606a}\
.b{fill:#fff;stroke:#d0d7de}.g{stroke:#8c959f;stroke-width:1;fill:none;opacity:.45}.q{stroke:#57606a;stroke-width:1.5;fill:none}.goal{stroke:#cf222e;stroke-width:3}.c0{fill:#0969da;stroke:#0969da}.c1{fill:#bc4c00;stroke:#bc4c00}\
.c2{fill:#1a7f37;stroke:#1a7f37}.c3{fill:#8250df;stroke:#8250df}.l{fill:none;stroke-width:2}\
@media(prefers-color-scheme:dark){text{fill:#e6edf3}.s{fill:#9198a1}.b{fill:#0d1117;stroke:#3d444d}.q{stroke:#c8d1da}.c0{fill:#4493f8;stroke:#4493f8}\
.c1{fill:#f0883e;stroke:#f0883e}.c2{fill:#3fb950;stroke:#3fb950}.c3{fill:#ab7df8;stroke:#ab7df8}.goal{stroke:#ff7b72}}</style>";

/// Bars of our rate by each peer's, one per line that has a ratio, below the name of its workload. The axis is logarithmic and begins at
/// equality: a bar to the right is faster than the peer, one to the left slower. A red mark stands at the goal.
#[must_use]
pub fn ratio_bars(title: &str, lines: &[&Line]) -> String {
    const LEFT: f64 = 210.0;
    const RIGHT: f64 = WIDTH - 180.0;
    const TOP: f64 = 66.0;
    const ROW: f64 = 20.0;
    // In powers of two, as far as any bar reaches.
    let logarithms = || {
        let ratios = lines.iter().filter_map(|line| line.ratio);
        ratios.map(|ratio| ratio.median.log2())
    };
    let least = logarithms().fold(-1.0, f64::min).floor().max(-6.0);
    let most = logarithms().fold(1.0, f64::max).ceil().min(6.0);
    let x = |ratio: f64| {
        let share = (ratio.log2().clamp(least, most) - least) / (most - least);
        LEFT + share * (RIGHT - LEFT)
    };
    let marks: Vec<f64> = (-6..=6)
        .map(f64::from)
        .filter(|mark| (least..=most).contains(mark))
        .collect();
    let mut rows = String::new();
    let mut y = TOP;
    let mut last = "";
    for line in lines {
        let (Some(ratio), Some((peer, _))) = (line.ratio, line.peer.as_ref()) else {
            continue;
        };
        if line.workload != last {
            last = &line.workload;
            rows += &text(20.0, y + 15.0, "h", last);
            y += ROW;
        }
        rows += &text(36.0, y + 14.0, "", peer);
        for mark in &marks {
            rows += &segment("g", (x(mark.exp2()), y), (x(mark.exp2()), y + ROW));
        }
        let (from, to) = (x(ratio.median.min(1.0)), x(ratio.median.max(1.0)));
        let class = if ratio.median < 1.0 { "c1" } else { "c0" };
        rows += &format!(
            "<rect class='{class}' x='{from:.1}' y='{:.1}' width='{:.1}' height='{}' fill-opacity='.75'/>",
            y + 3.0,
            to - from,
            ROW - 6.0
        );
        let middle = y + ROW / 2.0;
        rows += &segment("q", (x(ratio.low), middle), (x(ratio.high), middle));
        rows += &text(RIGHT + 12.0, y + 14.0, "", &format!("{:.2}x", ratio.median));
        if let Some(Goal::RatioAtLeast(goal) | Goal::RatioAtMost(goal)) = line.goal {
            rows += &segment("goal", (x(goal), y + 1.0), (x(goal), y + ROW - 1.0));
            let mut words = format!("goal {goal}x");
            if let Some(limit) = line.limit.as_ref().filter(|_| line.is_beyond()) {
                words += &format!(", file {:.2}x", limit.ratio);
            }
            rows += &text(RIGHT + 62.0, y + 14.0, "s", &words);
        }
        y += ROW;
    }
    let mut svg = opened(y + 14.0, title);
    svg += &text(
        20.0,
        44.0,
        "s",
        "rate of vmshadow / rate of the peer: median of the rounds, with quartiles; red: the goal",
    );
    for mark in marks {
        let name = if mark < 0.0 {
            format!("1/{}", (-mark).exp2())
        } else {
            format!("{}x", mark.exp2())
        };
        svg += &text(x(mark.exp2()) - 8.0, TOP - 4.0, "s", &name);
    }
    svg + &rows + "</svg>\n"
}

/// Curves over a logarithmic x.
#[must_use]
pub fn curves(title: &str, x_label: &str, y_label: &str, series: &[Series]) -> String {
    const LEFT: f64 = 80.0;
    const TOP: f64 = 50.0;
    const HEIGHT: f64 = 380.0;
    const BOTTOM: f64 = HEIGHT - 56.0;
    const RIGHT: f64 = WIDTH - 230.0;
    let points = || series.iter().flat_map(|series| &series.points);
    let mut xs: Vec<f64> = points().map(|point| point.0).filter(|x| *x > 0.0).collect();
    xs.sort_by(f64::total_cmp);
    xs.dedup();
    let (Some(first), Some(last)) = (xs.first().copied(), xs.last().copied()) else {
        return opened(HEIGHT, title) + "</svg>\n";
    };
    let span = (last / first).ln().max(f64::EPSILON);
    let highest = points().map(|point| point.1).fold(0.0_f64, f64::max);
    let step = round_step(highest.max(f64::EPSILON) / 4.0);
    let most = step * (highest / step).ceil().max(1.0);
    let x = |value: f64| LEFT + (value / first).ln() / span * (RIGHT - LEFT);
    let y = |value: f64| BOTTOM - value / most * (BOTTOM - TOP);
    let mut svg = opened(HEIGHT, title);
    svg += &format!("<path class='g' d='M{LEFT} {TOP}V{BOTTOM}H{RIGHT}'/>");
    for place in 0..=5 {
        let value = step * f64::from(place);
        if value > most * 1.001 {
            break;
        }
        svg += &text(12.0, y(value) + 4.0, "s", &number(value));
        svg += &segment("g", (LEFT - 4.0, y(value)), (RIGHT, y(value)));
    }
    for value in &xs {
        svg += &text(x(*value) - 8.0, BOTTOM + 16.0, "s", &number(*value));
    }
    svg += &text(LEFT, HEIGHT - 14.0, "", x_label);
    svg += &text(12.0, TOP - 8.0, "s", y_label);
    for (place, series) in series.iter().enumerate() {
        let class = place % 4;
        let mut path = String::new();
        for (at, value) in series.points.iter().filter(|point| point.0 > 0.0) {
            path += &format!(
                "{}{:.1} {:.1}",
                if path.is_empty() { 'M' } else { 'L' },
                x(*at),
                y(*value)
            );
            svg += &format!(
                "<circle class='c{class}' cx='{:.1}' cy='{:.1}' r='3.5'/>",
                x(*at),
                y(*value)
            );
        }
        svg += &format!("<path class='c{class} l' style='fill:none' d='{path}'/>");
        let row = TOP + 12.0 + 22.0 * place as f64;
        svg += &format!(
            "<rect class='c{class}' x='{}' y='{}' width='12' height='12'/>",
            RIGHT + 16.0,
            row - 10.0
        );
        svg += &text(RIGHT + 34.0, row, "", &series.name);
    }
    svg + "</svg>\n"
}

/// The least of 1, 2, 2.5, 5 times a power of ten that is not below `value`.
fn round_step(value: f64) -> f64 {
    let power = 10_f64.powf(value.log10().floor());
    let steps = [1.0, 2.0, 2.5, 5.0, 10.0].map(|step| step * power);
    let fits = steps.into_iter().find(|step| *step >= value * 0.999);
    fits.unwrap_or(value)
}

fn opened(height: f64, title: &str) -> String {
    format!(
        "<svg xmlns='http://www.w3.org/2000/svg' width='{WIDTH}' height='{height:.0}' viewBox='0 0 {WIDTH} {height:.0}' role='img'>{STYLE}\
         <rect class='b' x='.5' y='.5' width='{}' height='{:.0}' rx='6'/>{}",
        WIDTH - 1.0,
        height - 1.0,
        text(20.0, 24.0, "t", title)
    )
}

fn text(x: f64, y: f64, class: &str, content: &str) -> String {
    let content = content
        .replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;");
    format!("<text class='{class}' x='{x:.1}' y='{y:.1}'>{content}</text>\n")
}

fn segment(class: &str, from: (f64, f64), to: (f64, f64)) -> String {
    format!(
        "<path class='{class}' d='M{:.1} {:.1}L{:.1} {:.1}'/>\n",
        from.0, from.1, to.0, to.1
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::report::Report;

    /// Every opened element is closed, in order: what a browser asks of a drawing.
    fn well_formed(svg: &str) {
        let mut open = Vec::new();
        for tag in svg.split('<').skip(1) {
            let tag = tag.split('>').next().expect("a tag");
            if let Some(name) = tag.strip_prefix('/') {
                assert_eq!(open.pop(), Some(name), "in {svg}");
            } else if !tag.ends_with('/') {
                open.push(tag.split_whitespace().next().expect("a name"));
            }
        }
        assert!(open.is_empty(), "{open:?} stay open");
    }

    #[test]
    fn bars_are_as_long_as_the_logarithm_of_their_ratios() {
        let mut report = Report::default();
        let goal = Some(Goal::RatioAtLeast(1.5));
        report.compare(1, "a & b", "IOPS", &[4.0], "QSD <raw>", &[1.0], goal);
        report.compare(1, "a & b", "IOPS", &[1.0], "fio", &[2.0], None);
        let lines: Vec<&Line> = report.lines().iter().collect();
        let svg = ratio_bars("title", &lines);
        well_formed(&svg);
        assert_eq!(svg.matches("a &amp; b").count(), 1);
        assert!(svg.contains("QSD &lt;raw&gt;"), "{svg}");
        // The first is the ground.
        let widths: Vec<f64> = svg
            .split("<rect")
            .skip(2)
            .map(|rest| rest.split("width='").nth(1).expect("a width"))
            .map(|rest| {
                rest.split('\'')
                    .next()
                    .expect("a number")
                    .parse()
                    .expect("a number")
            })
            .collect();
        assert_eq!(widths.len(), 2);
        assert!((widths[0] / widths[1] - 2.0).abs() < 0.01, "{widths:?}");
        assert_eq!(svg.matches("class='goal'").count(), 1);
    }

    #[test]
    fn curves_have_a_mark_for_every_point_and_survive_having_none() {
        let series = |points: Vec<(f64, f64)>| Series {
            name: "s".to_owned(),
            points,
        };
        let both = [
            series(vec![(1.0, 5.0), (4096.0, 4.0)]),
            series(vec![(1.0, 2.0)]),
        ];
        let svg = curves("title", "snapshots", "IOPS", &both);
        well_formed(&svg);
        assert_eq!(svg.matches("<circle").count(), 3);
        assert!(!svg.contains("NaN"), "{svg}");
        well_formed(&curves("title", "x", "y", &[series(Vec::new())]));
    }
}
