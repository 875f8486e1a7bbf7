//! [`Family`]: the samples of one metric, as they are counted; how they look on a page is the
//! business of `http`.

/// Samples of one name.
#[derive(Debug, Clone, PartialEq)]
pub struct Family {
    pub name: &'static str,
    pub kind: FamilyKind,
    pub help: &'static str,
    pub samples: Vec<Sample>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FamilyKind {
    Counter,
    Gauge,
    Histogram,
}

/// One value. `suffix` is that of a histogram's part, else empty.
#[derive(Debug, Clone, PartialEq)]
pub struct Sample {
    pub suffix: &'static str,
    pub labels: Vec<(&'static str, String)>,
    pub value: f64,
}

pub fn family(
    name: &'static str,
    kind: FamilyKind,
    help: &'static str,
    samples: Vec<Sample>,
) -> Family {
    Family {
        name,
        kind,
        help,
        samples,
    }
}

pub fn one(name: &'static str, kind: FamilyKind, help: &'static str, value: f64) -> Family {
    family(
        name,
        kind,
        help,
        vec![Sample {
            suffix: "",
            labels: Vec::new(),
            value,
        }],
    )
}
