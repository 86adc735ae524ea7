//! Sums, products and multiples of matrices.

use super::expression::Expression;

/// Most cells of a product.
const MOST_CELLS: usize = 64;

type Rows = Vec<Vec<Expression>>;

/// The one matrix that an expression with matrices in it is; `None` if the sizes do not fit, or it has none.
pub(super) fn evaluated(expression: &Expression) -> Option<Rows> {
    match expression {
        Expression::Matrix(rows) => Some(rows.clone()),
        Expression::Negative(inner) => Some(map(evaluated(inner)?, &|cell| Expression::Negative(Box::new(cell)))),
        Expression::Quotient(above, below) if !has_matrix(below) => {
            let quotient = |cell| Expression::Quotient(Box::new(cell), below.clone());
            Some(map(evaluated(above)?, &quotient))
        }
        Expression::Sum(terms) => terms.iter().map(evaluated).reduce(|a, b| added(a?, b?))?,
        Expression::Product(factors) => {
            let (matrices, scalars): (Vec<_>, Vec<_>) = factors.iter().partition(|f| has_matrix(f));
            let product = matrices.into_iter().map(evaluated).reduce(|a, b| multiplied(&a?, &b?))??;
            if scalars.is_empty() {
                return Some(product);
            }
            let scale = |cell| Expression::Product(scalars.iter().copied().cloned().chain([cell]).collect());
            Some(map(product, &scale))
        }
        _ => None,
    }
}

/// Whether a matrix is in it, and it is not just one.
pub(super) fn is_operation(expression: &Expression) -> bool {
    let is_operator = matches!(
        expression,
        Expression::Negative(_) | Expression::Quotient(..) | Expression::Sum(_) | Expression::Product(_)
    );
    is_operator && has_matrix(expression)
}

fn has_matrix(expression: &Expression) -> bool {
    expression.any(&|e| matches!(e, Expression::Matrix(_)))
}

fn map(rows: Rows, change: &dyn Fn(Expression) -> Expression) -> Rows {
    rows.into_iter().map(|row| row.into_iter().map(change).collect()).collect()
}

fn added(one: Rows, two: Rows) -> Option<Rows> {
    let is_same_size = one.len() == two.len() && one.iter().zip(&two).all(|(a, b)| a.len() == b.len());
    is_same_size.then(|| {
        let row = |(a, b): (Vec<Expression>, Vec<Expression>)| {
            a.into_iter().zip(b).map(|(x, y)| Expression::Sum(vec![x, y])).collect()
        };
        one.into_iter().zip(two).map(row).collect()
    })
}

fn multiplied(one: &Rows, two: &Rows) -> Option<Rows> {
    let inner = two.len();
    let columns = two.first()?.len();
    if one.iter().any(|row| row.len() != inner) || one.len() * columns * inner > MOST_CELLS {
        return None;
    }
    let cell = |row: &Vec<Expression>, column: usize| {
        let terms = (0..inner).map(|k| Expression::Product(vec![row[k].clone(), two[k][column].clone()]));
        Expression::Sum(terms.collect())
    };
    Some(one.iter().map(|row| (0..columns).map(|c| cell(row, c)).collect()).collect())
}
