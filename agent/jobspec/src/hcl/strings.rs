//! String templates: literals, `${…}`, `%{ if }` and `%{ for }`, with their `~` markers.

use super::Problem;
use super::convert::to_text;
use super::eval::{Result, Scope};
use crate::Template;
use hcl_edit::Span as _;
use hcl_edit::template::{Directive, Element, ForDirective, IfDirective};

impl Scope<'_> {
    /// The text of a template; `strip_first` and `strip_last` are the `~` of what encloses it.
    pub(super) fn elements(&self, elements: Vec<&Element>, strip_first: bool, strip_last: bool) -> Result<Template> {
        let mut out = Template::default();
        for (at, element) in elements.iter().enumerate() {
            match element {
                Element::Literal(text) => {
                    let mut text = text.as_str();
                    let before = at.checked_sub(1).map(|at| elements[at]);
                    if before.map_or(strip_first, |element| strips(element).1) {
                        text = text.trim_start();
                    }
                    if elements.get(at + 1).map_or(strip_last, |element| strips(element).0) {
                        text = text.trim_end();
                    }
                    out.push_str(text);
                }
                Element::Interpolation(part) => {
                    let value = self.interpolation(&part.expr)?;
                    let wrong = || {
                        let message = format!("{} cannot stand inside a string", value.kind());
                        Problem::new(part.expr.span(), message)
                            .hint("jsonencode(…) or join(\", \", …) makes it a string")
                    };
                    out.append(&to_text(&value).ok_or_else(wrong)?);
                }
                Element::Directive(directive) => match directive.as_ref() {
                    Directive::If(directive) => out.append(&self.if_directive(directive)?),
                    Directive::For(directive) => self.for_directive(directive, &mut out)?,
                },
            }
            self.budget.spend(1, None)?;
        }
        self.budget.spend(out.size(), None)?;
        Ok(out)
    }

    fn if_directive(&self, directive: &IfDirective) -> Result<Template> {
        let start = &directive.if_expr;
        let condition = self.evaluate(&start.cond_expr)?;
        let holds = self.as_bool(&condition, &start.cond_expr)?;
        let end_strip = directive.endif_expr.strip.strip_start();
        match (&directive.else_expr, holds) {
            (None, false) => Ok(Template::default()),
            (None, true) => self.elements(start.template.iter().collect(), start.strip.strip_end(), end_strip),
            (Some(other), true) => {
                let strip_last = other.strip.strip_start();
                self.elements(start.template.iter().collect(), start.strip.strip_end(), strip_last)
            }
            (Some(other), false) => self.elements(other.template.iter().collect(), other.strip.strip_end(), end_strip),
        }
    }

    fn for_directive(&self, directive: &ForDirective, out: &mut Template) -> Result<()> {
        let start = &directive.for_expr;
        let names = (start.key_var.as_ref().map(|name| name.as_str()), start.value_var.as_str());
        let (strip_first, strip_last) = (start.strip.strip_end(), directive.endfor_expr.strip.strip_start());
        for (key, value) in &self.entries(&start.collection_expr)? {
            self.with(names, key, value, |scope| {
                out.append(&scope.elements(start.template.iter().collect(), strip_first, strip_last)?);
                Ok(())
            })?;
        }
        Ok(())
    }
}

/// Whether `element` strips blanks before and after itself.
fn strips(element: &Element) -> (bool, bool) {
    match element {
        Element::Literal(_) => (false, false),
        Element::Interpolation(part) => (part.strip.strip_start(), part.strip.strip_end()),
        Element::Directive(directive) => match directive.as_ref() {
            Directive::If(it) => (it.if_expr.strip.strip_start(), it.endif_expr.strip.strip_end()),
            Directive::For(it) => (it.for_expr.strip.strip_start(), it.endfor_expr.strip.strip_end()),
        },
    }
}
