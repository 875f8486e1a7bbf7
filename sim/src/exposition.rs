//! A strict reader of Prometheus' text format 0.0.4, and the conventions that names have to follow.
//! For tests of the library and of whole processes alike: it uses nothing but the standard library.
//!
//! <https://prometheus.io/docs/instrumenting/exposition_formats/>,
//! <https://prometheus.io/docs/practices/naming/>

use std::collections::BTreeSet;

/// Samples of one name.
#[derive(Debug, Default)]
pub struct Family {
    pub name: String,
    pub kind: String,
    pub help: String,
    pub samples: Vec<Sample>,
}

/// One line.
#[derive(Debug)]
pub struct Sample {
    /// The family's name, perhaps with the suffix of a histogram's part.
    pub name: String,
    pub labels: Vec<(String, String)>,
    pub value: f64,
}

impl Sample {
    pub fn label(&self, name: &str) -> Option<&str> {
        self.labels
            .iter()
            .find(|(label, _)| label == name)
            .map(|(_, value)| value.as_str())
    }
}

/// Units that are no base units, as parts of a name.
const WRONG_UNITS: [&str; 16] = [
    "ms",
    "us",
    "ns",
    "millis",
    "micros",
    "milliseconds",
    "microseconds",
    "nanoseconds",
    "minutes",
    "hours",
    "kib",
    "mib",
    "kb",
    "mb",
    "percent",
    "kilobytes",
];

/// Reads a page, and holds it to the format and the conventions.
pub fn check(page: &str) -> Result<Vec<Family>, String> {
    let families = parse(page)?;
    let mut names = BTreeSet::new();
    for family in &families {
        let told = |what: String| format!("{}: {what}", family.name);
        if !names.insert(family.name.clone()) {
            return Err(told("its family is there twice".into()));
        }
        check_name(family).map_err(told)?;
        check_samples(family).map_err(told)?;
        if family.kind == "histogram" {
            check_histogram(family).map_err(told)?;
        }
    }
    Ok(families)
}

fn parse(page: &str) -> Result<Vec<Family>, String> {
    if !page.ends_with('\n') {
        return Err("the last line does not end".into());
    }
    let mut families: Vec<Family> = Vec::new();
    for (at, line) in page.lines().enumerate() {
        let told = |what: &str| format!("line {}: {what}: {line}", at + 1);
        if let Some(rest) = line.strip_prefix("# HELP ") {
            let (name, help) = rest.split_once(' ').ok_or_else(|| told("no help"))?;
            families.push(Family {
                name: name.to_owned(),
                help: help.to_owned(),
                ..Family::default()
            });
        } else if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').ok_or_else(|| told("no type"))?;
            let family = families.last_mut().filter(|family| family.name == name);
            let family =
                family.filter(|family| family.kind.is_empty() && family.samples.is_empty());
            let family = family.ok_or_else(|| told("a type not right behind its help"))?;
            if !["counter", "gauge", "histogram"].contains(&kind) {
                return Err(told("an unknown type"));
            }
            family.kind = kind.to_owned();
        } else if line.starts_with('#') || line.is_empty() {
            return Err(told("neither a sample nor help nor a type"));
        } else {
            let sample = parse_sample(line).ok_or_else(|| told("not a sample"))?;
            let family = families.last_mut().filter(|family| !family.kind.is_empty());
            let family = family.ok_or_else(|| told("a sample without help and type"))?;
            if !belongs(&sample.name, family) {
                return Err(told("a sample among those of another family"));
            }
            family.samples.push(sample);
        }
    }
    Ok(families)
}

fn belongs(sample: &str, family: &Family) -> bool {
    match (
        family.kind.as_str(),
        sample.strip_prefix(family.name.as_str()),
    ) {
        ("histogram", Some(suffix)) => ["_bucket", "_sum", "_count"].contains(&suffix),
        (_, Some(suffix)) => suffix.is_empty(),
        (_, None) => false,
    }
}

fn parse_sample(line: &str) -> Option<Sample> {
    let end = line.find(['{', ' '])?;
    let (name, rest) = line.split_at(end);
    let mut labels = Vec::new();
    let mut rest = rest;
    if let Some(inner) = rest.strip_prefix('{') {
        rest = inner;
        loop {
            let (label, quoted) = rest.split_once("=\"")?;
            let (value, behind) = unquote(quoted)?;
            labels.push((label.to_owned(), value));
            match behind.strip_prefix(',') {
                Some(next) => rest = next,
                None => {
                    rest = behind.strip_prefix('}')?;
                    break;
                }
            }
        }
    }
    let value = rest.strip_prefix(' ')?;
    let value = if value == "+Inf" {
        f64::INFINITY
    } else {
        value.parse().ok()?
    };
    Some(Sample {
        name: name.to_owned(),
        labels,
        value,
    })
}

/// The value of a label up to its closing quote, and what stands behind that.
fn unquote(text: &str) -> Option<(String, &str)> {
    let mut value = String::new();
    let mut characters = text.char_indices();
    while let Some((at, character)) = characters.next() {
        match character {
            '"' => return Some((value, &text[at + 1..])),
            '\\' => value.push(match characters.next()?.1 {
                'n' => '\n',
                escaped @ ('"' | '\\') => escaped,
                _ => return None,
            }),
            other => value.push(other),
        }
    }
    None
}

fn check_name(family: &Family) -> Result<(), String> {
    let name = family.name.as_str();
    let is_word = |name: &str| {
        !name.starts_with(|first: char| first.is_ascii_digit())
            && !name.is_empty()
            && name
                .chars()
                .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_' || c == ':')
    };
    if !is_word(name) {
        return Err("it is no name".into());
    }
    if family.help.trim().is_empty() || family.kind.is_empty() {
        return Err("it has no help, or no type".into());
    }
    let is_deprecated = family.help.starts_with("Deprecated");
    match family.kind.as_str() {
        "counter" if !name.ends_with("_total") => return Err("a counter ends in _total".into()),
        "gauge"
            if ["_total", "_sum", "_count", "_bucket"]
                .iter()
                .any(|suffix| name.ends_with(suffix)) =>
        {
            return Err("a gauge is called as if it were something else".into());
        }
        "histogram"
            if name.ends_with("_seconds")
                && !name.ends_with("_duration_seconds")
                && !is_deprecated =>
        {
            return Err("a histogram of times ends in _duration_seconds".into());
        }
        _ => {}
    }
    match name.split('_').find(|part| WRONG_UNITS.contains(part)) {
        Some(unit) => Err(format!("{unit} is no base unit")),
        None => Ok(()),
    }
}

fn check_samples(family: &Family) -> Result<(), String> {
    let mut seen = BTreeSet::new();
    for sample in &family.samples {
        let mut labels = sample.labels.clone();
        labels.sort();
        if labels.windows(2).any(|pair| pair[0].0 == pair[1].0) {
            return Err(format!("a label is there twice: {labels:?}"));
        }
        if labels.iter().any(|(name, _)| {
            !name.chars().all(|c| c.is_ascii_lowercase() || c == '_') || name.starts_with("__")
        }) {
            return Err(format!("a label has no name: {labels:?}"));
        }
        if !seen.insert((sample.name.clone(), labels.clone())) {
            return Err(format!(
                "a series is there twice: {} {labels:?}",
                sample.name
            ));
        }
        if family.kind != "gauge" && (sample.value.is_nan() || sample.value < 0.0) {
            return Err(format!("it has counted {}", sample.value));
        }
    }
    Ok(())
}

/// The buckets of each series grow up to the count, and end with one for everything.
fn check_histogram(family: &Family) -> Result<(), String> {
    let without_bound = |sample: &Sample| {
        let labels = sample
            .labels
            .iter()
            .filter(|(name, _)| name != "le")
            .cloned();
        labels.collect::<BTreeSet<_>>()
    };
    let all: BTreeSet<_> = family.samples.iter().map(without_bound).collect();
    for labels in all {
        let part = |suffix: &str| {
            let name = format!("{}{suffix}", family.name);
            let is_part = |sample: &&Sample| sample.name == name && without_bound(sample) == labels;
            family.samples.iter().filter(is_part).collect::<Vec<_>>()
        };
        let bound = |sample: &&Sample| match sample.label("le") {
            Some("+Inf") => Some(f64::INFINITY),
            Some(bound) => bound.parse::<f64>().ok(),
            None => None,
        };
        let buckets = part("_bucket");
        let bounds: Vec<f64> = buckets.iter().filter_map(bound).collect();
        let grows = bounds.windows(2).all(|pair| pair[0] < pair[1])
            && buckets
                .windows(2)
                .all(|pair| pair[0].value <= pair[1].value);
        if bounds.len() != buckets.len() || bounds.last() != Some(&f64::INFINITY) || !grows {
            return Err(format!("the buckets of {labels:?} do not grow up to +Inf"));
        }
        let (sums, counts) = (part("_sum"), part("_count"));
        if sums.len() != 1
            || counts.len() != 1
            || counts[0].value != buckets[buckets.len() - 1].value
        {
            return Err(format!(
                "{labels:?} has no sum, or another count than its buckets"
            ));
        }
    }
    Ok(())
}

#[test]
fn a_page_that_breaks_a_rule_is_told_from_one_that_does_not() {
    let head =
        |name: &str, kind: &str| format!("# HELP {name} What it is.\n# TYPE {name} {kind}\n");
    let good = [
        format!(
            "{}a_total{{x=\"1,\\\"}}\"}} 1\na_total{{x=\"2\"}} 2\n",
            head("a_total", "counter")
        ),
        format!("{}a_bytes -1.5\n", head("a_bytes", "gauge")),
        format!(
            "{}a_duration_seconds_bucket{{le=\"0.1\"}} 1\na_duration_seconds_bucket{{le=\"+Inf\"}} \
             2\na_duration_seconds_sum 3\na_duration_seconds_count 2\n",
            head("a_duration_seconds", "histogram")
        ),
    ];
    for page in &good {
        assert!(check(page).is_ok(), "{:?}", check(page));
    }
    let bad = [
        "a_total 1\n".to_owned(),
        head("a_total", "counter") + "a_total 1",
        head("a_total", "counter") + "b_total 1\n",
        head("a_total", "counter") + "a_total 1\na_total 2\n",
        head("a_total", "counter") + "a_total{x=\"1} 1\n",
        head("a_total", "counter") + "a_total{X=\"1\"} 1\n",
        head("a_total", "counter") + "a_total -1\n",
        head("a_total", "counter")
            + "a_total 1\n"
            + &head("b", "gauge")
            + "b 1\n"
            + &head("a_total", "counter")
            + "a_total{x=\"\"} 1\n",
        head("a", "counter") + "a 1\n",
        head("a_total", "gauge") + "a_total 1\n",
        head("a_ms", "gauge") + "a_ms 1\n",
        head("A", "gauge") + "A 1\n",
        head("a_seconds", "histogram"),
        head("a_duration_seconds", "histogram") + "a_duration_seconds_bucket{le=\"1\"} 1\n",
        "# TYPE a gauge\na 1\n".to_owned(),
    ];
    for page in &bad {
        assert!(check(page).is_err(), "{page}");
    }
}
