// The losses of spoloss in JavaScript: elementwise functions of the margin h (nats).
// x = beta * h / rewardGap. A test compares every number with spoloss itself.
"use strict";

const logistic = (x) => (x < 0 ? Math.exp(x) / (1 + Math.exp(x)) : 1 / (1 + Math.exp(-x)));
const logLogistic = (x) => Math.min(x, 0) - Math.log1p(Math.exp(-Math.abs(x)));

// -x * e^(-x) (paper eq. 6), continued along its tangent below x = linearBelow (null: nowhere).
function spo({ beta, rewardGap, linearBelow }) {
  const b = beta / rewardGap;
  const x0 = linearBelow === null ? -Infinity : linearBelow;
  const held = (h) => Math.max(b * h, x0);
  return {
    value: (h) => -held(h) * Math.exp(-held(h)) + (b * h - held(h)) * (held(h) - 1) * Math.exp(-held(h)),
    slope: (h) => b * (held(h) - 1) * Math.exp(-held(h)),
    curvature: (h) => (b * h < x0 ? 0 : b * b * (2 - b * h) * Math.exp(-b * h)),
  };
}

// -(1-e) * log s(x) - e * log s(-x) (DPO eq. 7); DPO knows no reward gap, so x = beta * h.
function dpo({ beta, labelSmoothing }) {
  const e = labelSmoothing;
  return {
    value: (h) => (e - 1) * logLogistic(beta * h) - (e === 0 ? 0 : e * logLogistic(-beta * h)),
    slope: (h) => -beta * ((1 - e) * logistic(-beta * h) - e * logistic(beta * h)),
    curvature: (h) => beta * beta * logistic(beta * h) * logistic(-beta * h),
  };
}

// (h - rewardGap/beta)^2 (paper section 2.2).
function squared({ beta, rewardGap }) {
  const target = rewardGap / beta;
  return {
    value: (h) => (h - target) ** 2,
    slope: (h) => 2 * (h - target),
    curvature: () => 2,
  };
}

// The derivative with respect to the rejected completion's probability, times its reference probability, where only
// that probability moves: pi_l = pi_ref * e^(-h), so dl/dpi_l = -slope(h) / pi_l (paper eq. 7-8).
const byRejectedProbability = (loss) => (h) => -loss.slope(h) * Math.exp(h);
