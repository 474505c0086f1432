//! Figures as SVG, drawn with plotters: histograms, reliability diagrams, ranges by class, heat maps.
//!
//! Every function returns the text of a whole SVG file. Colours keep apart for colour-blind readers; text stays text, so that a browser can search it.

use anyhow::Result;
use kd_train::analysis::agreement::Confidence;
use kd_train::analysis::{Summary, histogram};
use plotters::coord::Shift;
use plotters::coord::types::RangedCoordf64;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// The student, right predictions, the main thing.
pub const BLUE: RGBColor = RGBColor(0, 114, 178);
/// The teacher, wrong predictions, what is compared with.
pub const ORANGE: RGBColor = RGBColor(213, 94, 0);
const INK: RGBColor = RGBColor(40, 40, 40);
const BINS: usize = 40;

/// Values of one kind in a histogram.
pub struct Series {
    /// Its name in the legend.
    pub name: String,
    /// Its colour.
    pub colour: RGBColor,
    /// Its values.
    pub values: Vec<f64>,
}

/// One panel of histograms over the same axis.
pub struct Panel {
    /// Above it.
    pub title: String,
    /// Below it, with the unit.
    pub axis: String,
    /// What is drawn, the first at the back.
    pub series: Vec<Series>,
}

/// Mean and deviation of a class.
pub struct Range {
    /// The class.
    pub name: String,
    /// Its numbers.
    pub summary: Summary,
}

/// Histograms side by side; with `ranges`, the classes below them in the order given, over `axis`.
pub fn histograms(title: &str, panels: &[Panel], ranges: &[Range], axis: &str) -> Result<String> {
    let top = 400;
    let below = if ranges.is_empty() { 0 } else { 70 + 15 * ranges.len() as i32 };
    draw(((460 * panels.len() as u32).max(600), (top + below) as u32), title, |area| {
        let (upper, lower) = area.split_vertically(top - 34);
        for (panel, part) in panels.iter().zip(upper.split_evenly((1, panels.len().max(1)))) {
            self::panel(&part, panel)?;
        }
        if ranges.is_empty() { Ok(()) } else { self::ranges(&lower, ranges, axis) }
    })
}

/// A reliability diagram of each network, with the share of samples below.
pub fn reliability(title: &str, networks: &[(String, RGBColor, &Confidence)]) -> Result<String> {
    draw((440 * networks.len() as u32, 560), title, |area| {
        for ((name, colour, network), part) in networks.iter().zip(area.split_evenly((1, networks.len()))) {
            let (upper, lower) = part.split_vertically(390);
            diagram(&upper, name, *colour, network)?;
            shares(&lower, *colour, network)?;
        }
        Ok(())
    })
}

/// A matrix as colours.
pub struct Heat<'a> {
    /// What the rows are, beside them.
    pub y: &'a str,
    /// What the columns are, below them.
    pub x: &'a str,
    /// Names of the rows, from the top.
    pub rows: &'a [String],
    /// Names of the columns.
    pub columns: &'a [String],
    /// Row after row; NaN is grey.
    pub values: &'a [f64],
    /// The values of the first and the last colour.
    pub range: [f64; 2],
    /// Two colours around a pale middle, not one from pale to dark.
    pub diverging: bool,
    /// What the colours mean, with the unit.
    pub scale: &'a str,
}

/// A heat map; few cells also show their number.
pub fn heat_map(title: &str, heat: &Heat<'_>) -> Result<String> {
    let (n, m) = (heat.rows.len() as i32, heat.columns.len() as i32);
    let cell = (680 / n.max(m).max(1)).clamp(8, 64);
    let font = (cell - 1).clamp(8, 14);
    let longest = |names: &[String]| names.iter().map(|s| s.chars().count()).max().unwrap_or(0) as i32 * (font * 11 / 20 + 1) + 14;
    let (left, foot) = (longest(heat.rows) + 24, longest(heat.columns) + 34);
    let size = ((left + m * cell + 130).max(480) as u32, (34 + n * cell + foot) as u32);
    draw(size, title, |area| {
        let (right, bottom) = (left + m * cell, n * cell);
        for (at, value) in heat.values.iter().enumerate() {
            let (row, column) = (at as i32 / m, at as i32 % m);
            let (x, y) = (left + column * cell, row * cell);
            let colour = heat.colour(*value);
            // One pixel over, or hairlines show between the cells.
            let more = i32::from(cell < 20);
            area.draw(&Rectangle::new([(x, y), (x + cell - 1 + more, y + cell - 1 + more)], colour.filled()))?;
            if n.max(m) <= 12 {
                let dark = u32::from(colour.0) + u32::from(colour.1) + u32::from(colour.2) < 450;
                let ink = if dark { WHITE } else { INK };
                let text = if value.is_nan() { "-".to_string() } else { format!("{value:.2}") };
                area.draw(&Text::new(text, (x + cell / 2, y + cell / 2), style(13, ink, HPos::Center, VPos::Center)))?;
            }
        }
        for (i, name) in heat.rows.iter().enumerate() {
            let at = (left - 6, i as i32 * cell + cell / 2);
            area.draw(&Text::new(name.as_str(), at, style(font, INK, HPos::Right, VPos::Center)))?;
        }
        for (j, name) in heat.columns.iter().enumerate() {
            let at = (left + j as i32 * cell + cell / 2, bottom + 6);
            area.draw(&Text::new(name.as_str(), at, turned(font, HPos::Right)))?;
        }
        area.draw(&Text::new(heat.x, (left + m * cell / 2, bottom + foot - 16), style(15, INK, HPos::Center, VPos::Center)))?;
        area.draw(&Text::new(heat.y, (12, bottom / 2), turned(15, HPos::Center)))?;
        heat.bar(area, right + 26, bottom)
    })
}

impl Heat<'_> {
    fn colour(&self, value: f64) -> RGBColor {
        if value.is_nan() {
            return RGBColor(200, 200, 200);
        }
        let [low, high] = self.range;
        let stops: &[[f64; 3]] = if self.diverging {
            &[[33.0, 102.0, 172.0], [146.0, 197.0, 222.0], [250.0, 250.0, 250.0], [244.0, 165.0, 130.0], [178.0, 24.0, 43.0]]
        } else {
            &[[252.0, 253.0, 255.0], [158.0, 202.0, 225.0], [49.0, 130.0, 189.0], [8.0, 48.0, 107.0]]
        };
        let at = ((value - low) / (high - low)).clamp(0.0, 1.0) * (stops.len() - 1) as f64;
        let first = (at as usize).min(stops.len() - 2);
        let part = at - first as f64;
        let [r, g, b] = std::array::from_fn(|c| (stops[first][c] * (1.0 - part) + stops[first + 1][c] * part).round() as u8);
        RGBColor(r, g, b)
    }

    fn bar(&self, area: &Area<'_>, x: i32, height: i32) -> Result<()> {
        let height = height.clamp(120, 360);
        let [low, high] = self.range;
        let value = |y: i32| high - (high - low) * f64::from(y) / f64::from(height - 1);
        for y in 0..height {
            area.draw(&Rectangle::new([(x, y), (x + 16, y + 1)], self.colour(value(y)).filled()))?;
        }
        for i in 0..5 {
            let y = i * (height - 1) / 4;
            area.draw(&Text::new(format!("{:.2}", value(y)), (x + 22, y.clamp(6, height - 6)), style(12, INK, HPos::Left, VPos::Center)))?;
        }
        area.draw(&Text::new(self.scale, (x + 70, height / 2), turned(13, HPos::Center)))?;
        Ok(())
    }
}

/// A white page with its title, the rest of which `content` fills.
fn draw(size: (u32, u32), title: &str, content: impl FnOnce(&Area<'_>) -> Result<()>) -> Result<String> {
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, size).into_drawing_area();
        root.fill(&WHITE)?;
        root.draw(&Text::new(title, (size.0 as i32 / 2, 17), style(19, INK, HPos::Center, VPos::Center)))?;
        let (_, rest) = root.split_vertically(34);
        content(&rest)?;
        root.present()?;
    }
    Ok(svg)
}

/// Text of `size` pixels; plotters writes 1/1.24 of what it is told.
fn style(size: i32, colour: RGBColor, h: HPos, v: VPos) -> TextStyle<'static> {
    text(("sans-serif", f64::from(size) * 1.24).into_font(), colour, Pos::new(h, v))
}

/// Text from the bottom to the top.
fn turned(size: i32, h: HPos) -> TextStyle<'static> {
    let font = ("sans-serif", f64::from(size) * 1.24).into_font().transform(FontTransform::Rotate270);
    text(font, INK, Pos::new(h, VPos::Center))
}

fn text(font: FontDesc<'static>, colour: RGBColor, pos: Pos) -> TextStyle<'static> {
    TextStyle { font, color: colour.to_backend_color(), pos }
}

fn panel(area: &Area<'_>, panel: &Panel) -> Result<()> {
    let all = panel.series.iter().flat_map(|s| s.values.iter().copied());
    let (mut low, mut high) = Summary::of(all).map_or((0.0, 1.0), |s| (s.min, s.max));
    if high - low < 1e-9 {
        (low, high) = (low - 0.5, high + 0.5);
    }
    let bars: Vec<Vec<f64>> = panel.series.iter().map(|s| histogram(&s.values, low, high, BINS)).collect();
    let most = 100.0 * bars.iter().flatten().copied().fold(0.0, f64::max);
    let mut chart = ChartBuilder::on(area)
        .caption(&panel.title, style(15, INK, HPos::Left, VPos::Top))
        .margin(10)
        .margin_right(18)
        .x_label_area_size(46)
        .y_label_area_size(54)
        .build_cartesian_2d(low..high, 0.0..(1.3 * most).max(1e-9))?;
    mesh(&mut chart, &panel.axis, "share of the samples (%)")?;
    let edge = |i: usize| low + (high - low) * i as f64 / BINS as f64;
    for (series, bars) in panel.series.iter().zip(&bars) {
        let colour = series.colour;
        let boxes = bars.iter().enumerate().filter(|(_, share)| **share > 0.0);
        let boxes = boxes.map(|(i, share)| Rectangle::new([(edge(i), 0.0), (edge(i + 1), 100.0 * share)], colour.mix(0.35).filled()));
        chart
            .draw_series(boxes)?
            .label(&series.name)
            .legend(move |(x, y)| Rectangle::new([(x, y - 5), (x + 14, y + 5)], colour.mix(0.6).filled()));
        let outline: Vec<(f64, f64)> =
            bars.iter().enumerate().flat_map(|(i, share)| [(edge(i), 100.0 * share), (edge(i + 1), 100.0 * share)]).collect();
        chart.draw_series([PathElement::new(outline, colour.stroke_width(2))])?;
    }
    if panel.series.len() > 1 {
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperRight)
            .background_style(WHITE.mix(0.8))
            .border_style(INK.mix(0.2))
            .label_font(style(13, INK, HPos::Left, VPos::Top))
            .draw()?;
    }
    Ok(())
}

/// Axes with their names and a faint grid.
fn mesh<B: DrawingBackend>(chart: &mut ChartContext<'_, B, Cartesian2d<RangedCoordf64, RangedCoordf64>>, x: &str, y: &str) -> Result<()>
where
    B::ErrorType: 'static,
{
    chart
        .configure_mesh()
        .x_desc(x)
        .y_desc(y)
        .x_labels(8)
        .y_labels(6)
        .max_light_lines(0)
        .bold_line_style(INK.mix(0.12))
        .axis_style(INK.mix(0.6))
        .label_style(style(12, INK, HPos::Center, VPos::Center))
        .axis_desc_style(style(14, INK, HPos::Center, VPos::Center))
        .draw()?;
    Ok(())
}

fn ranges(area: &Area<'_>, ranges: &[Range], axis: &str) -> Result<()> {
    let longest = ranges.iter().map(|r| r.name.chars().count()).max().unwrap_or(0) as i32;
    let low = ranges.iter().map(|r| r.summary.mean - r.summary.sd).fold(f64::INFINITY, f64::min);
    let high = ranges.iter().map(|r| r.summary.mean + r.summary.sd).fold(f64::NEG_INFINITY, f64::max);
    let pad = 0.04 * (high - low).max(1e-9);
    let left = longest * 7 + 24;
    let mut chart = ChartBuilder::on(area)
        .margin_right(18)
        .margin_top(4)
        .x_label_area_size(46)
        .y_label_area_size(left)
        .build_cartesian_2d(low - pad..high + pad, ranges.len() as f64..0.0)?;
    chart
        .configure_mesh()
        .disable_y_mesh()
        .y_labels(0)
        .x_labels(6)
        .x_desc(axis)
        .max_light_lines(0)
        .bold_line_style(INK.mix(0.12))
        .axis_style(INK.mix(0.6))
        .label_style(style(12, INK, HPos::Center, VPos::Center))
        .axis_desc_style(style(14, INK, HPos::Center, VPos::Center))
        .draw()?;
    for (i, range) in ranges.iter().enumerate() {
        let (y, s) = (i as f64 + 0.5, range.summary);
        chart.draw_series([PathElement::new(vec![(s.mean - s.sd, y), (s.mean + s.sd, y)], BLUE.mix(0.5).stroke_width(2))])?;
        chart.draw_series([Circle::new((s.mean, y), 3, BLUE.filled())])?;
        let (_, row) = chart.backend_coord(&(s.mean, y));
        let (x0, y0) = area.get_base_pixel();
        let at = (x0 + left - 8, row);
        // The area counts its pixels from its own corner.
        area.draw(&Text::new(range.name.as_str(), (at.0 - x0, at.1 - y0), style(11, INK, HPos::Right, VPos::Center)))?;
    }
    Ok(())
}

fn diagram(area: &Area<'_>, name: &str, colour: RGBColor, network: &Confidence) -> Result<()> {
    let caption = format!("{name}: accuracy {:.2} %, ECE {:.4}", 100.0 * network.accuracy, network.ece);
    let mut chart = ChartBuilder::on(area)
        .caption(caption, style(15, INK, HPos::Left, VPos::Top))
        .margin(10)
        .margin_right(18)
        .x_label_area_size(46)
        .y_label_area_size(54)
        .build_cartesian_2d(0.0..1.0, 0.0..1.0)?;
    mesh(&mut chart, "confidence (largest probability)", "accuracy (share that is right)")?;
    let filled = network.bins.iter().filter(|b| b.n > 0);
    chart
        .draw_series(filled.clone().map(|b| Rectangle::new([(b.from, 0.0), (b.to, b.accuracy)], colour.mix(0.55).filled())))?
        .label("accuracy")
        .legend(move |(x, y)| Rectangle::new([(x, y - 5), (x + 14, y + 5)], colour.mix(0.7).filled()));
    let gap = RGBColor(120, 120, 120);
    chart
        .draw_series(filled.map(|b| Rectangle::new([(b.from, b.accuracy), (b.to, b.confidence)], gap.mix(0.35).filled())))?
        .label("gap to the confidence")
        .legend(move |(x, y)| Rectangle::new([(x, y - 5), (x + 14, y + 5)], gap.mix(0.5).filled()));
    chart.draw_series([PathElement::new(vec![(0.0, 0.0), (1.0, 1.0)], INK.mix(0.7).stroke_width(1))])?;
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .background_style(WHITE.mix(0.8))
        .border_style(INK.mix(0.2))
        .label_font(style(13, INK, HPos::Left, VPos::Top))
        .draw()?;
    Ok(())
}

fn shares(area: &Area<'_>, colour: RGBColor, network: &Confidence) -> Result<()> {
    let total = network.bins.iter().map(|b| b.n).sum::<usize>().max(1) as f64;
    let share = |n: usize| 100.0 * n as f64 / total;
    let most = network.bins.iter().map(|b| share(b.n)).fold(0.0, f64::max);
    let mut chart = ChartBuilder::on(area)
        .margin(10)
        .margin_right(18)
        .x_label_area_size(46)
        .y_label_area_size(54)
        .build_cartesian_2d(0.0..1.0, 0.0..(1.1 * most).max(1e-9))?;
    mesh(&mut chart, "confidence", "samples (%)")?;
    chart.draw_series(network.bins.iter().map(|b| Rectangle::new([(b.from, 0.0), (b.to, share(b.n))], colour.mix(0.55).filled())))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_histogram_has_its_words_and_survives_equal_values() {
        let series = |name: &str, values: Vec<f64>| Series { name: name.to_string(), colour: BLUE, values };
        let panels = [Panel {
            title: "norms <of> all".to_string(),
            axis: "norm".to_string(),
            series: vec![series("a", vec![2.0, 2.0]), series("b", vec![])],
        }];
        let summary = Summary::of([1.0, 3.0]).unwrap();
        let svg = histograms("title", &panels, &[Range { name: "apple".to_string(), summary }], "norm").unwrap();
        for word in ["<svg", "title", "norms &lt;of&gt; all", "share of the samples (%)", "apple", "</svg>"] {
            assert!(svg.contains(word), "no `{word}`");
        }
        assert!(!svg.contains("NaN"));
    }

    #[test]
    fn colours_go_from_end_to_end() {
        let heat = Heat { y: "", x: "", rows: &[], columns: &[], values: &[], range: [-1.0, 1.0], diverging: true, scale: "" };
        assert_eq!(heat.colour(0.0), RGBColor(250, 250, 250));
        assert_eq!([heat.colour(-5.0), heat.colour(1.0)], [RGBColor(33, 102, 172), RGBColor(178, 24, 43)]);
        assert_eq!(heat.colour(f64::NAN), RGBColor(200, 200, 200));
        let names = ["a", "b"].map(String::from);
        let heat = Heat { rows: &names, columns: &names, values: &[0.0, 0.25, f64::NAN, 1.0], ..heat };
        let svg = heat_map("two", &heat).unwrap();
        assert!(svg.contains("0.25") && svg.contains("</svg>"));
    }
}
