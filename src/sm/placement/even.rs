//! Who takes what: items that each take a number of bins, so that all bins are taken about equally
//! often, and as cheaply as that allows.
//!
//! Replicas are dealt out so (a shard takes nodes), and homes (a shard takes one of its voters). It
//! is a flow of least cost: a change of the assignment that makes it better is a cycle among the
//! bins, on which each bin hands an item on to the next. Cancelling cycles until there is none that
//! gains (Klein 1967) ends with the most even assignment, and the cheapest among those. What is
//! there already is cheapest and is where the search begins, so few cycles are left to find.

/// One that takes bins.
#[derive(Debug, Clone)]
pub struct BinTaker {
    /// Number of bins it takes. At least as many are open to it.
    pub takes: usize,
    /// Cost of each bin: above 0 where it is not yet, None where it may not be.
    pub costs: Vec<Option<i64>>,
}

/// Weight of one unit of unevenness against costs: more than all costs of an assignment together.
const EVEN: i64 = 1 << 36;

/// For each item the bins that it takes, in order.
pub fn assign(items: &[BinTaker], bins: usize) -> Vec<Vec<usize>> {
    assert!(
        items.iter().all(|item| item.costs.len() == bins),
        "each item has a cost for each bin"
    );
    let mut assignment = TakenBins::first(items, bins);
    assignment.level();
    while let Some(cycle) = assignment.gaining_cycle() {
        for (from, to, step) in cycle {
            // A weighing step moves nothing: it only closes a cycle that changes the loads.
            if let FlowStep::Hand(item) = step {
                assignment.hand_on(item, from, to);
            }
        }
    }
    assignment
        .by_item
        .iter()
        .map(|is_taken| (0..bins).filter(|bin| is_taken[*bin]).collect())
        .collect()
}

struct TakenBins<'a> {
    items: &'a [BinTaker],
    /// By item and bin.
    by_item: Vec<Vec<bool>>,
    /// Number of times that each bin is taken.
    loads: Vec<i64>,
}

/// A way to move one unit from one bin to another.
#[derive(Debug, Clone, Copy)]
enum FlowStep {
    /// This item takes the other bin for the first.
    Hand(usize),
    /// The first may be taken once more, the other once less: the end of a cycle that changes the
    /// loads.
    Weigh,
}

type Edge = Option<(i64, FlowStep)>;

impl<'a> TakenBins<'a> {
    /// Every item takes what it has already, then gives up the dearest and fullest bins or takes
    /// the emptiest until it has its number.
    fn first(items: &'a [BinTaker], bins: usize) -> Self {
        let by_item: Vec<Vec<bool>> = items
            .iter()
            .map(|item| {
                item.costs
                    .iter()
                    .map(|cost| cost.is_some_and(|cost| cost <= 0))
                    .collect()
            })
            .collect();
        let loads = (0..bins)
            .map(|bin| by_item.iter().filter(|taken| taken[bin]).count() as i64)
            .collect();
        let mut taken = Self {
            items,
            by_item,
            loads,
        };

        // All give up first, so that those that take see how full the bins will be.
        for (index, item) in items.iter().enumerate() {
            let mut count = taken.by_item[index]
                .iter()
                .filter(|is_taken| **is_taken)
                .count();
            while count > item.takes {
                let has = (0..bins).filter(|bin| taken.by_item[index][*bin]);
                let fullest = has.max_by_key(|bin| (item.costs[*bin], taken.loads[*bin]));
                taken.set(index, fullest.expect("it takes more than it should"), false);
                count -= 1;
            }
        }
        for (index, item) in items.iter().enumerate() {
            let count = taken.by_item[index]
                .iter()
                .filter(|is_taken| **is_taken)
                .count();
            for _ in count..item.takes {
                let free = (0..bins).filter(|bin| !taken.by_item[index][*bin]);
                let allowed = free
                    .filter_map(|bin| item.costs[bin].map(|cost| (taken.loads[bin], cost, bin)));
                let Some((_, _, emptiest)) = allowed.min() else {
                    break;
                };
                taken.set(index, emptiest, true);
            }
        }
        taken
    }

    fn set(&mut self, item: usize, bin: usize, is_taken: bool) {
        self.by_item[item][bin] = is_taken;
        self.loads[bin] += if is_taken { 1 } else { -1 };
    }

    fn hand_on(&mut self, item: usize, from: usize, to: usize) {
        self.set(item, from, false);
        self.set(item, to, true);
    }

    /// Returns the cost of having `item` take `to` instead of `from`; None if it may not.
    fn price(&self, item: usize, from: usize, to: usize) -> Option<i64> {
        let (taken, costs) = (&self.by_item[item], &self.items[item].costs);
        let may = taken[from] && !taken[to];
        Some(costs[to].filter(|_| may)? - costs[from]?)
    }

    /// From the fullest bin to the emptiest while an item can change between them: the short way
    /// through most of the work.
    fn level(&mut self) {
        let bins = self.loads.len();
        loop {
            let fullest = (0..bins).max_by_key(|bin| self.loads[*bin]);
            let emptiest = (0..bins).min_by_key(|bin| self.loads[*bin]);
            let (Some(from), Some(to)) = (fullest, emptiest) else {
                return;
            };

            // Even to ±1: no further step makes it more even.
            if self.loads[from] - self.loads[to] <= 1 {
                return;
            }
            let prices =
                (0..self.items.len()).filter_map(|item| Some((self.price(item, from, to)?, item)));
            let Some((_, item)) = prices.min() else {
                return;
            };
            self.hand_on(item, from, to);
        }
    }

    /// The cheapest step from each bin (row) to each other.
    fn edges(&self) -> Vec<Vec<Edge>> {
        let bins = self.loads.len();
        // One more in the first and one less in the other changes the sum of the squares of their
        // loads by this.
        let weigh = |from: usize, to: usize| 2 * EVEN * (self.loads[from] - self.loads[to] + 1);
        let may_weigh = |from: usize, to: usize| self.loads[from] < self.loads[to];
        let row = |from: usize| {
            (0..bins)
                .map(|to| may_weigh(from, to).then(|| (weigh(from, to), FlowStep::Weigh)))
                .collect()
        };
        let mut edges: Vec<Vec<Edge>> = (0..bins).map(row).collect();

        // Of all items that could be handed on this way, the cheapest makes the edge.
        for (item, taken) in self.by_item.iter().enumerate() {
            for from in (0..bins).filter(|bin| taken[*bin]) {
                for (to, edge) in edges[from].iter_mut().enumerate() {
                    let Some(price) = self.price(item, from, to) else {
                        continue;
                    };
                    if edge.is_none_or(|(cost, _)| price < cost) {
                        *edge = Some((price, FlowStep::Hand(item)));
                    }
                }
            }
        }
        edges
    }

    /// A cycle of steps that makes the assignment better (Bellman and Ford's search); none when it
    /// is the best.
    fn gaining_cycle(&self) -> Option<Vec<(usize, usize, FlowStep)>> {
        let bins = self.loads.len();
        let edges = self.edges();

        // Every bin begins at 0, as if all were reached from outside: so a cycle anywhere is found.
        let mut reached = vec![0_i64; bins];
        let mut before: Vec<Option<(usize, FlowStep)>> = vec![None; bins];
        loop {
            let mut is_changed = false;
            for (from, row) in edges.iter().enumerate() {
                for (to, edge) in row.iter().enumerate() {
                    let Some((cost, step)) = edge else { continue };
                    if reached[from] + cost < reached[to] {
                        reached[to] = reached[from] + cost;
                        before[to] = Some((from, *step));
                        is_changed = true;
                    }
                }
            }
            if !is_changed {
                return None;
            }
            // The ways back form a cycle exactly when there is one that gains.
            if let Some(cycle) = (0..bins).find_map(|bin| cycle_through(&before, bin)) {
                return Some(cycle);
            }
        }
    }
}

/// The cycle that one gets back to `bin` by, if the ways back from it lead there again.
fn cycle_through(
    before: &[Option<(usize, FlowStep)>],
    bin: usize,
) -> Option<Vec<(usize, usize, FlowStep)>> {
    let mut cycle = Vec::new();
    let mut at = bin;

    // A longer way has met a bin twice: then it leads into a cycle without this one.
    while cycle.len() < before.len() {
        let (from, step) = before[at]?;
        cycle.push((from, at, step));
        at = from;
        if at == bin {
            return Some(cycle);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    use super::*;

    /// Every way to choose `takes` of `bins`.
    fn choices(takes: usize, bins: &[usize]) -> Vec<Vec<usize>> {
        match (takes, bins) {
            (0, _) => vec![Vec::new()],
            (_, []) => Vec::new(),
            (_, [bin, rest @ ..]) => {
                let with = choices(takes - 1, rest)
                    .into_iter()
                    .map(|more| [vec![*bin], more].concat());
                with.chain(choices(takes, rest)).collect()
            }
        }
    }

    /// Returns the unevenness of an assignment (the sum of the squares of the loads) and its cost.
    fn score(items: &[BinTaker], bins: usize, taken: &[Vec<usize>]) -> (usize, i64) {
        let load = |bin| taken.iter().flatten().filter(|one| **one == bin).count();
        let costs = items
            .iter()
            .zip(taken)
            .flat_map(|(item, taken)| taken.iter().map(|bin| item.costs[*bin].expect("allowed")));
        (
            (0..bins).map(|bin| load(bin) * load(bin)).sum(),
            costs.sum(),
        )
    }

    /// The best score of all assignments, one by one.
    fn best(items: &[BinTaker], bins: usize, taken: &mut Vec<Vec<usize>>) -> (usize, i64) {
        let Some(item) = items.get(taken.len()) else {
            return score(items, bins, taken);
        };
        let allowed: Vec<usize> = (0..bins).filter(|bin| item.costs[*bin].is_some()).collect();
        let scores = choices(item.takes, &allowed).into_iter().map(|choice| {
            taken.push(choice);
            let score = best(items, bins, taken);
            taken.pop();
            score
        });
        scores.min().expect("a choice")
    }

    #[test]
    fn no_other_assignment_is_more_even_or_as_even_and_cheaper() {
        for seed in 0..400 {
            let mut rng = StdRng::seed_from_u64(seed);
            let bins = rng.random_range(1..=4);
            let items: Vec<BinTaker> = (0..rng.random_range(1..=4))
                .map(|_| {
                    let cost =
                        |rng: &mut StdRng| rng.random_bool(0.8).then(|| rng.random_range(-1..=3));
                    let mut costs: Vec<Option<i64>> = (0..bins).map(|_| cost(&mut rng)).collect();
                    costs[rng.random_range(0..bins)] = Some(2);
                    let allowed = costs.iter().flatten().count();
                    BinTaker {
                        takes: rng.random_range(1..=allowed),
                        costs,
                    }
                })
                .collect();
            let taken = assign(&items, bins);
            assert!(
                items
                    .iter()
                    .zip(&taken)
                    .all(|(item, taken)| item.takes == taken.len()),
                "seed {seed}"
            );
            assert_eq!(
                score(&items, bins, &taken),
                best(&items, bins, &mut Vec::new()),
                "seed {seed}: {items:?}"
            );
        }
    }
}
