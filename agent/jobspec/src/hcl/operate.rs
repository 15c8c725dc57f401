//! Operators, and the values that they and conditions need.

use super::convert::{to_bool, to_number};
use super::eval::{Result, Scope, not_known_yet};
use super::{Problem, Value};
use crate::Template;
use hcl_edit::expr::{BinaryOp, BinaryOperator, Expression};
use hcl_edit::{Number, Span as _};
use std::ops::Range;

impl Scope<'_> {
    pub(super) fn binary(&self, operation: &BinaryOp) -> Result<Value> {
        let (lhs, rhs) = (&operation.lhs_expr, &operation.rhs_expr);
        let operator = *operation.operator.value();
        let left = self.evaluate(lhs)?;
        if let BinaryOperator::And | BinaryOperator::Or = operator {
            // Short circuit, so that `var.x != null && var.x > 1` works.
            let left = self.as_bool(&left, lhs)?;
            if left == (operator == BinaryOperator::Or) {
                return Ok(Value::Bool(left));
            }
            let right = self.evaluate(rhs)?;
            return Ok(Value::Bool(self.as_bool(&right, rhs)?));
        }
        let right = self.evaluate(rhs)?;
        match operator {
            BinaryOperator::Eq | BinaryOperator::NotEq => {
                self.known(&left, lhs)?;
                self.known(&right, rhs)?;
                Ok(Value::Bool((left == right) == (operator == BinaryOperator::Eq)))
            }
            BinaryOperator::And | BinaryOperator::Or => Ok(Value::Null), // answered above
            BinaryOperator::Less | BinaryOperator::LessEq | BinaryOperator::Greater | BinaryOperator::GreaterEq => {
                let (left, right) = (self.as_number(&left, lhs)?, self.as_number(&right, rhs)?);
                let order = left.partial_cmp(&right);
                Ok(Value::Bool(match operator {
                    BinaryOperator::Less => order.is_some_and(|order| order.is_lt()),
                    BinaryOperator::LessEq => order.is_some_and(|order| order.is_le()),
                    BinaryOperator::Greater => order.is_some_and(|order| order.is_gt()),
                    _ => order.is_some_and(|order| order.is_ge()),
                }))
            }
            _ => arithmetic(operator, self.as_number(&left, lhs)?, self.as_number(&right, rhs)?, rhs.span()),
        }
    }

    fn known(&self, value: &Value, expression: &Expression) -> Result<()> {
        let pending = |text: &Template| text.as_literal().is_none();
        let unknown = match value {
            Value::Text(text) => pending(text),
            Value::List(items) => return items.iter().try_for_each(|item| self.known(item, expression)),
            Value::Map(items) => return items.values().try_for_each(|item| self.known(item, expression)),
            _ => false,
        };
        if unknown { Err(not_known_yet(expression.span(), "a comparison")) } else { Ok(()) }
    }

    pub(super) fn as_bool(&self, value: &Value, expression: &Expression) -> Result<bool> {
        self.known(value, expression)?;
        let wrong = || Problem::new(expression.span(), format!("true or false is required, this is {}", value.kind()));
        to_bool(value).ok_or_else(wrong)
    }

    pub(super) fn as_number(&self, value: &Value, expression: &Expression) -> Result<Number> {
        self.known(value, expression)?;
        let wrong = || Problem::new(expression.span(), format!("a number is required, this is {}", value.kind()));
        to_number(value).ok_or_else(wrong)
    }
}

pub(super) fn arithmetic(
    operator: BinaryOperator,
    left: Number,
    right: Number,
    span: Option<Range<usize>>,
) -> Result<Value> {
    let whole = |number: Number| number.as_i64().map(i128::from);
    let exact = match (operator, whole(left), whole(right)) {
        (BinaryOperator::Plus, Some(left), Some(right)) => Some(left + right),
        (BinaryOperator::Minus, Some(left), Some(right)) => Some(left - right),
        (BinaryOperator::Mul, Some(left), Some(right)) => Some(left * right),
        (BinaryOperator::Div, Some(left), Some(right)) if right != 0 && left % right == 0 => Some(left / right),
        (BinaryOperator::Mod, Some(left), Some(right)) if right != 0 => Some(left % right),
        _ => None,
    };
    if let Some(exact) = exact.and_then(|exact| i64::try_from(exact).ok()) {
        return Ok(Value::Number(Number::from(exact)));
    }
    let (Some(left), Some(right)) = (left.as_f64(), right.as_f64()) else {
        return Err(Problem::new(span, "this number is out of range"));
    };
    if right == 0.0 && matches!(operator, BinaryOperator::Div | BinaryOperator::Mod) {
        return Err(Problem::new(span, "division by zero"));
    }
    let result = match operator {
        BinaryOperator::Plus => left + right,
        BinaryOperator::Minus => left - right,
        BinaryOperator::Mul => left * right,
        BinaryOperator::Div => left / right,
        _ => left % right,
    };
    Number::from_f64(result).map(Value::Number).ok_or_else(|| Problem::new(span, "the result is out of range"))
}
