"use strict";
// Elements are made here and nowhere else. Text from a model goes into textContent or an
// attribute's value: it never becomes markup.

const SVG = "http://www.w3.org/2000/svg";

function h(name, attributes = {}, ...children) {
  return fill(document.createElement(name), attributes, children);
}

function svg(name, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, name), attributes, children);
}

function fill(element, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) {
    if (value === true) element.setAttribute(key, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(key, value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

function byId(id) {
  return document.getElementById(id);
}

function fixed(value, digits) {
  return value === null || value === undefined ? "not finite" : value.toFixed(digits);
}

function percent(value) {
  if (value === null) return "not finite";
  if (value > 0 && value < 0.0001) return "under 0.01 %";
  return `${Number((100 * value).toPrecision(3))} %`;
}

function counted(count, one, many = `${one}s`) {
  return `${count.toLocaleString("en")} ${count === 1 ? one : many}`;
}
